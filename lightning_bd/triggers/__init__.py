"""Triggers: how the pixels of an image change."""

from lightning_bd.triggers.adaptive_blend import AdaptiveBlend
from lightning_bd.triggers.badnets import BadNets
from lightning_bd.triggers.base import TensorSpec, Trigger
from lightning_bd.triggers.blended import Blended
from lightning_bd.triggers.bpp import BppAttack
from lightning_bd.triggers.input_aware import InputAwareTrigger
from lightning_bd.triggers.lira import LIRATrigger
from lightning_bd.triggers.low_frequency import LowFrequency
from lightning_bd.triggers.narcissus import Narcissus
from lightning_bd.triggers.sequential import SequentialTrigger
from lightning_bd.triggers.sig import SIG
from lightning_bd.triggers.ssba import SSBA
from lightning_bd.triggers.train_test import TrainTestTrigger
from lightning_bd.triggers.wanet import WaNet

__all__ = (
    "SIG",
    "SSBA",
    "AdaptiveBlend",
    "BadNets",
    "Blended",
    "BppAttack",
    "InputAwareTrigger",
    "LIRATrigger",
    "LowFrequency",
    "Narcissus",
    "SequentialTrigger",
    "TensorSpec",
    "TrainTestTrigger",
    "Trigger",
    "WaNet",
)
