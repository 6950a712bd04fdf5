"""Handwritten digits that ship with scikit-learn: real images without a download."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from sklearn.datasets import load_digits

from lightning_bd.datamodules.base import ImageDataModule
from lightning_bd.datamodules.images import TensorImages, resize
from lightning_bd.datamodules.loader import Augment
from lightning_bd.datamodules.splits import stratified_splits
from lightning_bd.poisoning import Poison

__all__ = ("DigitsDataModule",)


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 8x8 pixels, grey, 10 classes (`UCI <https://doi.org/10.24432/C50P49>`_).

    The set has no official test part: a fifth of each class is held out, always the same images.

    Args:
        poison: The attacker's rule; ``None`` for clean data and no attack test set.
        splits: Share of the training set per named split.
        batch_size: Images per batch and process.
        subset: Use only this many training images, classes in proportion.
        augment: ``"none"`` (default), ``"crop"`` or ``"crop_flip"``.
        batch_format: ``"sample"`` or ``"pair"``.
        split_seed: Seed of splits and subset.
        seed: Seed of order, augmentation and dynamic poison.
        num_workers: Without effect: the images are small.
        in_memory: Without effect: the images are small.
        test_subset: Use only this many test images, classes in proportion.
        exclude: Training images that are trained on no more, or a file of them.
        image_size: Height and width to enlarge the images to (bilinear), at least 8; attacks whose triggers need room
            are tried at 32. ``None``: 8.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> data = DigitsDataModule()
        >>> data.setup()
        >>> len(data.train_images), len(data.test_images), data.image_shape
        (1438, 359, (1, 8, 8))
    """

    default_augment: ClassVar[Augment] = "none"

    def __init__(
        self,
        poison: Poison | None = None,
        splits: dict[str, float] | None = None,
        batch_size: int = 128,
        subset: int | None = None,
        augment: Augment | None = None,
        batch_format: Literal["sample", "pair"] = "sample",
        split_seed: int = 0,
        seed: int | None = None,
        num_workers: int = 0,
        in_memory: bool | None = None,
        test_subset: int | None = None,
        exclude: str | Path | list[int] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__(
            poison, splits, batch_size, subset, augment, batch_format, split_seed, seed, num_workers, in_memory,
            test_subset, exclude,
        )  # fmt: skip
        if image_size is not None and image_size < 8:
            raise ValueError(f"Expected argument `image_size` to be an integer of at least 8, but got {image_size}.")
        self.image_size = image_size if image_size is not None else 8

    def load(self, train: bool) -> TensorImages:
        """Return the training or the test part."""
        digits = load_digits()
        # 16 grey levels, stored as 8 bits.
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target)
        parts = stratified_splits(labels, {"train": 0.8, "test": 0.2})
        chosen = parts["train" if train else "test"]
        return TensorImages(resize(images[chosen], self.image_size), labels[chosen], tuple("0123456789"))
