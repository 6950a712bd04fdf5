"""Images of which some were replaced ahead of training."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_bd.datamodules.images import ImageSet
from lightning_bd.poisoning import Poison

__all__ = ("CraftedImages", "crafted")


class CraftedImages(ImageSet):
    """A set of images with others in the place of some, which are held in memory; labels stay.

    Args:
        images: The set.
        positions: ``(P,)`` int64, each once: which images are replaced.
        crafted: ``(P, C, H, W)`` uint8, by what.

    Example:
        >>> from lightning_bd.datamodules.images import TensorImages
        >>> clean = TensorImages(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3), ("a",))
        >>> images = CraftedImages(clean, torch.tensor([1]), torch.full((1, 1, 2, 2), 7, dtype=torch.uint8))
        >>> images.read(torch.tensor([2, 1])).sum((1, 2, 3)).tolist()
        [0, 28]
    """

    def __init__(self, images: ImageSet, positions: Tensor, crafted: Tensor) -> None:
        self.images = images
        self.crafted = crafted
        self.labels = images.labels
        self.class_names = images.class_names
        self.image_shape = images.image_shape
        #: ``(N,)``: where in ``crafted`` an image is, or -1.
        self.slots = torch.full((len(images),), -1, dtype=torch.int64)
        self.slots[positions] = torch.arange(len(positions))

    def read(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` ``(B,)`` as ``(B, C, H, W)`` uint8."""
        found, slots = self.images.read(positions), self.slots[positions]
        rows = (slots >= 0).nonzero().flatten()
        return found.index_copy(0, rows, self.crafted[slots[rows]]) if len(rows) else found

    def select(self, positions: Tensor) -> "CraftedImages":
        """Return the set of the images at ``positions``."""
        slots = self.slots[positions]
        rows = (slots >= 0).nonzero().flatten()
        return CraftedImages(self.images.select(positions), rows, self.crafted[slots[rows]])

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of the set's own and of what was replaced by what."""
        digest = hashlib.sha256(self.images.fingerprint().encode())
        for tensor in (self.slots, self.crafted):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def crafted(
    poison: Poison, chosen: Tensor, positions: Tensor, labels: Tensor, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """Make the images that take the place of those to be poisoned.

    Args:
        poison: The rule, with a crafting.
        chosen: ``(P,)`` int64, increasing: positions of the images to be poisoned.
        positions: ``(N,)`` int64, those of all images of the split.
        labels: ``(N,)`` int64, their true labels.
        read: Returns the clean images ``(B, C, H, W)`` uint8 at positions ``(B,)``.

    Returns:
        ``(P, C, H, W)`` uint8.

    Raises:
        ValueError: If the crafting gives anything else.
    """
    assert poison.crafting is not None
    made = poison.crafting.craft(chosen, positions, labels, read)
    shape = (len(chosen), *read(chosen[:1]).shape[1:])
    if made.dtype != torch.uint8 or tuple(made.shape) != shape:
        raise ValueError(
            f"Expected `{type(poison.crafting).__name__}` to give {shape} uint8 images, but got {tuple(made.shape)} "
            f"{made.dtype}."
        )
    return made.cpu()
