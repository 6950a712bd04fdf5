"""Handwritten digits that ship with scikit-learn: real images without a download."""

from typing import ClassVar

import torch
from sklearn.datasets import load_digits

from lightning_bd.datamodules.base import ImageDataModule
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.datamodules.loader import Augment
from lightning_bd.datamodules.splits import stratified_splits

__all__ = ("DigitsDataModule",)


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 8x8 pixels, grey, 10 classes (`UCI <https://doi.org/10.24432/C50P49>`_).

    The set has no official test part: a fifth of each class is held out, always the same images.

    Example:
        >>> data = DigitsDataModule()
        >>> data.setup()
        >>> len(data.train_images), len(data.test_images), data.image_shape
        (1438, 359, (1, 8, 8))
    """

    default_augment: ClassVar[Augment] = "none"

    def load(self, train: bool) -> TensorImages:
        """Return the training or the test part."""
        digits = load_digits()
        # 16 grey levels, stored as 8 bits.
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target)
        parts = stratified_splits(labels, {"train": 0.8, "test": 0.2})
        chosen = parts["train" if train else "test"]
        return TensorImages(images[chosen], labels[chosen], tuple("0123456789"))
