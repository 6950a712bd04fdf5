"""Metrics of backdoored and defended models, and of what detects them."""

from lightning_bd.functional.backdoor import defense_effectiveness_rating
from lightning_bd.metrics.attack_success_rate import AttackSuccessRate, AttackSuccessRateAll
from lightning_bd.metrics.detection import (
    DetectionAUROC,
    DetectionAveragePrecision,
    DetectionMetrics,
    FalsePositiveRate,
    TruePositiveRate,
)
from lightning_bd.metrics.robust_accuracy import RobustAccuracy

__all__ = (
    "AttackSuccessRate",
    "AttackSuccessRateAll",
    "DetectionAUROC",
    "DetectionAveragePrecision",
    "DetectionMetrics",
    "FalsePositiveRate",
    "RobustAccuracy",
    "TruePositiveRate",
    "defense_effectiveness_rating",
)
