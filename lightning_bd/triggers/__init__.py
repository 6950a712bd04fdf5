"""Triggers: how the pixels of an image change."""

from lightning_bd.triggers.badnets import BadNets
from lightning_bd.triggers.base import TensorSpec, Trigger
from lightning_bd.triggers.blended import Blended
from lightning_bd.triggers.bpp import BppAttack
from lightning_bd.triggers.low_frequency import LowFrequency
from lightning_bd.triggers.sequential import SequentialTrigger
from lightning_bd.triggers.sig import SIG
from lightning_bd.triggers.train_test import TrainTestTrigger
from lightning_bd.triggers.wanet import WaNet

__all__ = (
    "SIG",
    "BadNets",
    "Blended",
    "BppAttack",
    "LowFrequency",
    "SequentialTrigger",
    "TensorSpec",
    "TrainTestTrigger",
    "Trigger",
    "WaNet",
)
