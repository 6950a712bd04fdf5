"""Loaders that share a datamodule's settings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bd.batch import BatchContext
from lightning_bd.datamodules.crafted import CraftedImages
from lightning_bd.datamodules.images import ImageSet
from lightning_bd.datamodules.loader import Augment, BatchLoader, Place
from lightning_bd.poisoning import Poison

__all__ = ("LoaderFactory",)


@dataclass(frozen=True)
class LoaderFactory:
    """Makes the loaders of one datamodule.

    Args:
        poison: The attacker's rule; ``None`` for none.
        batch_size: Images per batch and process, where nothing else is said.
        seed: Seed of order, augmentation and dynamic poison.
        augment: Augmentation of training loaders.
        padding: Pixels that a crop may move by.
        place: Returns the current epoch, rank and world size.
        num_workers: Processes that decode files.
    """

    poison: Poison | None
    batch_size: int
    seed: int
    augment: Augment
    padding: int
    place: Callable[[], Place]
    num_workers: int

    def loader(
        self, images: ImageSet, positions: Tensor, context: BatchContext, batch_size: int | None = None
    ) -> BatchLoader:
        """Return the loader of some images under a rule.

        Args:
            images: The set.
            positions: ``(N,)`` which of them.
            context: The rule.
            batch_size: Images per batch and process; ``None`` for the usual.
        """
        return BatchLoader(
            images,
            positions,
            context,
            batch_size=batch_size or self.batch_size,
            seed=self.seed,
            poison=self.poison,
            augment=self.augment,
            padding=self.padding,
            place=self.place,
            num_workers=self.num_workers,
        )

    def evaluation(self, images: ImageSet, positions: Tensor, name: str) -> list[BatchLoader]:
        """Return the clean images and, with a poison, those that it aims at, all triggered.

        Args:
            images: The set.
            positions: ``(N,)`` which of them.
            name: Of the evaluation, for messages; ``test`` are the images that an attack made elsewhere is of.

        Raises:
            ValueError: If the poison aims at none of them.
        """
        loaders = [self.loader(images, positions, BatchContext(name))]
        if self.poison is not None:
            victims = positions[self.poison.victims(images.labels[positions])]
            crafting = self.poison.crafting
            made = crafting.attack_images(images.image_shape, len(images)) if crafting and name == "test" else None
            if crafting is not None and made is None and crafting.attack_digest() is not None:
                return loaders  # only the test images were made
            if made is not None:
                victims = victims[torch.isin(victims, made[0])]
            if len(victims) == 0:
                raise ValueError(f"Expected {name} images that the attack aims at, but the poison has no victim there.")
            loader = self.loader(images, victims, BatchContext(name, "all", self.poison.mode, final=made is not None))
            if made is not None:
                loader.images = CraftedImages(images, *made)
            loaders.append(loader)
        return loaders

    def clean(self, images: ImageSet, name: str, positions: Tensor | None = None) -> BatchLoader:
        """Return images as they are, in order.

        Args:
            images: The set, of the datamodule's image shape.
            name: Of the loader, for messages.
            positions: ``(N,)`` which of them; ``None`` for all.
        """
        return self.loader(images, torch.arange(len(images)) if positions is None else positions, BatchContext(name))
