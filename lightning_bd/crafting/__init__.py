"""Poisoned images that are made one by one, ahead of training."""

from lightning_bd.crafting.base import AbsentCrafting, Crafting
from lightning_bd.crafting.label_consistent import LabelConsistent
from lightning_bd.crafting.precomputed import PrecomputedPoison

__all__ = ("AbsentCrafting", "Crafting", "LabelConsistent", "PrecomputedPoison")
