"""Callbacks that drop into any Lightning project."""

from lightning_bd.callbacks.continual import ElasticWeightConsolidation
from lightning_bd.callbacks.defense import DefenderData, Defense, FineTuning, Report
from lightning_bd.callbacks.flatness import SharpnessAwareMinimization

__all__ = (
    "DefenderData",
    "Defense",
    "ElasticWeightConsolidation",
    "FineTuning",
    "Report",
    "SharpnessAwareMinimization",
)
