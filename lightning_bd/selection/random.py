"""A random difficulty: the baseline of every selection."""

import torch
from torch import Tensor

from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.digests import image_digests, keyed_order

__all__ = ("RandomSelection",)


class RandomSelection(SampleScorer):
    """Scores each image by a hash of its pixels, uniform in [0, 1): an order that means nothing.

    The baseline of `Wicked Oddities <https://arxiv.org/abs/2407.10825>`_. Unlike a draw it is a property of the image,
    so that it does not change when others are added, left out or put in another order.

    Args:
        seed: Another seed, another order.

    Example:
        >>> images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
        >>> scores = RandomSelection().score(images, torch.zeros(4), 0)
        >>> torch.equal(RandomSelection().score(images.flip(0), torch.zeros(4), 0).flip(0), scores)
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return scores ``(N,)`` float64 in [0, 1) of images ``(N, C, H, W)``; labels and target do not matter."""
        hashes = [keyed_order(digest, f"{self.seed} scores") for digest in image_digests(images)]
        # 53 bits: as many as a float64 holds.
        numbers = [int.from_bytes(value[:8], "little") >> 11 for value in hashes]
        return torch.tensor(numbers, dtype=torch.float64) / 2**53
