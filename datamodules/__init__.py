"""Datamodules: one file per data set, the mechanics in ``base``."""

from lightning_bd.datamodules.base import ImageDataModule, PhaseData
from lightning_bd.datamodules.cifar10 import CIFAR10DataModule
from lightning_bd.datamodules.cifar100 import CIFAR100DataModule
from lightning_bd.datamodules.defender import DefenderView
from lightning_bd.datamodules.digits import DigitsDataModule
from lightning_bd.datamodules.disk import DiskDataModule
from lightning_bd.datamodules.excluded import write_excluded
from lightning_bd.datamodules.gtsrb import GTSRBDataModule
from lightning_bd.datamodules.image_folder import ImageFolderDataModule
from lightning_bd.datamodules.ood import OODDataModule, ood_loader
from lightning_bd.datamodules.svhn import SVHNDataModule
from lightning_bd.datamodules.tiny_imagenet import TinyImageNetDataModule

__all__ = (
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DefenderView",
    "DigitsDataModule",
    "DiskDataModule",
    "GTSRBDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "OODDataModule",
    "PhaseData",
    "SVHNDataModule",
    "TinyImageNetDataModule",
    "ood_loader",
    "write_excluded",
)
