"""Datamodules: one file per data set, the mechanics in ``base``."""

from lightning_bd.datamodules.base import DiskDataModule, ImageDataModule, PhaseData
from lightning_bd.datamodules.defender import DefenderView
from lightning_bd.datamodules.digits import DigitsDataModule

__all__ = ("DefenderView", "DigitsDataModule", "DiskDataModule", "ImageDataModule", "PhaseData")
