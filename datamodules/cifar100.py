"""CIFAR-100."""

from typing import ClassVar

from torchvision.datasets import CIFAR10, CIFAR100

from lightning_bd.datamodules.cifar10 import CIFAR10DataModule

__all__ = ("CIFAR100DataModule",)


class CIFAR100DataModule(CIFAR10DataModule):
    """60,000 photographs of 32x32 pixels, 100 classes (`Krizhevsky, 2009 <https://www.cs.toronto.edu/~kriz/cifar.html>`_).

    Read by torchvision from ``root/cifar-100-python``; its checksums are verified before anything is unpickled.
    The arguments are those of :class:`~lightning_bd.datamodules.DiskDataModule`.

    Example:
        >>> CIFAR100DataModule(root="/data", batch_size=256).image_size
        32
    """

    reader: ClassVar[type[CIFAR10]] = CIFAR100
