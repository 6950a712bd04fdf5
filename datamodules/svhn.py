"""SVHN: street view house numbers."""

from typing import ClassVar

import torch
from torchvision.datasets import SVHN
from torchvision.datasets.utils import check_integrity

from lightning_bd.datamodules.disk import DiskDataModule
from lightning_bd.datamodules.images import TensorImages, resize
from lightning_bd.datamodules.loader import Augment

__all__ = ("SVHNDataModule",)


class SVHNDataModule(DiskDataModule):
    """73,257 training and 26,032 test digits of 32x32 pixels (`Netzer et al., 2011 <http://ufldl.stanford.edu/housenumbers>`_).

    Read by torchvision from ``root/train_32x32.mat`` and ``root/test_32x32.mat``. Not mirrored: digits have a side.
    The arguments are those of :class:`~lightning_bd.datamodules.DiskDataModule`.

    Example:
        >>> SVHNDataModule(root="/data").augment
        'crop'
    """

    default_augment: ClassVar[Augment] = "crop"

    def prepare_data(self) -> None:
        """Download the data set if that was asked for and it is missing."""
        if self.download:
            for split in ("train", "test"):
                SVHN(self.root, split=split, download=True)

    def load(self, train: bool) -> TensorImages:
        """Return the training or the test images."""
        split = "train" if train else "test"
        _, name, checksum = SVHN.split_list[split]
        path = self._require(name)
        if not check_integrity(path, checksum):
            raise self._incomplete(path, "it is broken (its checksum differs)")
        data = SVHN(self.root, split=split)
        # Torchvision gives a transposed view of an array.
        images = torch.from_numpy(data.data).contiguous()
        return TensorImages(resize(images, self.image_size), torch.from_numpy(data.labels), tuple("0123456789"))
