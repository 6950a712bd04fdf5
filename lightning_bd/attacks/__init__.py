"""Attacks that train their trigger together with the model."""

from lightning_bd.attacks.input_aware import InputAware
from lightning_bd.attacks.lira import LIRA

__all__ = ("LIRA", "InputAware")
