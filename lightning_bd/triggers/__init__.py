"""Triggers: how the pixels of an image change."""

from lightning_bd.triggers.badnets import BadNets
from lightning_bd.triggers.base import TensorSpec, Trigger
from lightning_bd.triggers.blended import Blended
from lightning_bd.triggers.sig import SIG
from lightning_bd.triggers.wanet import WaNet

__all__ = ("SIG", "BadNets", "Blended", "TensorSpec", "Trigger", "WaNet")
