"""Defenses: try to remove a backdoor with a little clean data."""

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.fine_tuning import FineTuning

__all__ = ("DefenderData", "Defense", "FineTuning", "NotApplicableError", "Report")
