"""Callbacks that drop into any Lightning project."""

from lightning_bd.callbacks.defense import DefenderData, Defense, FineTuning, Report
from lightning_bd.callbacks.flatness import SharpnessAwareMinimization

__all__ = ("DefenderData", "Defense", "FineTuning", "Report", "SharpnessAwareMinimization")
