"""Callbacks that seek flat minima."""

from lightning_bd.callbacks.flatness.sharpness_aware_minimization import SharpnessAwareMinimization

__all__ = ("SharpnessAwareMinimization",)
