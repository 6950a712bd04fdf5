"""CIFAR-10."""

from typing import ClassVar

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from lightning_bd.datamodules.disk import DiskDataModule
from lightning_bd.datamodules.images import TensorImages, resize

__all__ = ("CIFAR10DataModule",)


class CIFAR10DataModule(DiskDataModule):
    """60,000 photographs of 32x32 pixels, 10 classes (`Krizhevsky, 2009 <https://www.cs.toronto.edu/~kriz/cifar.html>`_).

    Read by torchvision from ``root/cifar-10-batches-py``; its checksums are verified before anything is unpickled.
    The arguments are those of :class:`~lightning_bd.datamodules.DiskDataModule`.

    Example:
        >>> CIFAR10DataModule(root="/data", splits={"inject": 0.85, "consolidate": 0.10, "defend": 0.05}).augment
        'crop_flip'
    """

    #: Torchvision's reader.
    reader: ClassVar[type[CIFAR10]] = CIFAR10

    def prepare_data(self) -> None:
        """Download the data set if that was asked for and it is missing."""
        if self.download:
            self.reader(self.root, download=True)

    def load(self, train: bool) -> TensorImages:
        """Return the training or the test images."""
        reader = self.reader
        folder = self._require(reader.base_folder)
        for name, checksum in (*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])):
            if not check_integrity(folder / name, checksum):
                raise self._incomplete(folder, f"its file {name} is missing or broken (its checksum differs)")
        data = reader(self.root, train=train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(resize(images, self.image_size), torch.tensor(data.targets), data.classes)
