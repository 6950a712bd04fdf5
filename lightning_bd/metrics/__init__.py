"""Metrics of backdoored and defended models."""

from lightning_bd.functional.backdoor import defense_effectiveness_rating
from lightning_bd.metrics.attack_success_rate import AttackSuccessRate, AttackSuccessRateAll
from lightning_bd.metrics.robust_accuracy import RobustAccuracy

__all__ = ("AttackSuccessRate", "AttackSuccessRateAll", "RobustAccuracy", "defense_effectiveness_rating")
