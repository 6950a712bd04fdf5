"""How far an image lies from its nearest neighbours in its class."""

import torch
from torch import Tensor

from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.encoders import Encoder
from lightning_bd.selection.typicality import score_by_class

__all__ = ("KNNTypicality", "mean_neighbour_similarity")

#: Similarities that are held at a time, 256 MiB of float32.
_HELD = 2**26
_BLOCK = 640


def mean_neighbour_similarity(directions: Tensor, k: int) -> Tensor:
    """Return the mean of each row's ``k`` largest cosine similarities to the other rows.

    Similarities are float32, their mean is float64. The work grows with the square of the rows, the memory does not.

    Args:
        directions: ``(N, D)`` float32, rows of norm 1.
        k: Neighbours, in [1, N - 1].

    Returns:
        ``(N,)`` float64 in [-1, 1].

    Example:
        >>> mean_neighbour_similarity(torch.eye(3)[[0, 0, 1]], k=1).tolist()
        [1.0, 1.0, 0.0]
    """
    count = len(directions)
    strip = max(1, _HELD // count)
    means = []
    for start in range(0, count, strip):
        stop = min(start + strip, count)
        held = directions.new_empty((stop - start, count))
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            rows, block = directions[first:last], held[first - start : last - start]
            block[:, :start] = rows @ directions[:start].T
            block[:, first:] = rows @ directions[first:].T
            # The matrix is symmetric: what is held already need not be multiplied again.
            held[last - start :, first:last] = block[:, last:stop].T
        # An image is no neighbour of itself.
        held.diagonal(start).fill_(-torch.inf)
        means.append(held.topk(k, dim=1, sorted=False).values.double().mean(dim=1))
    return torch.cat(means)


class KNNTypicality(SampleScorer):
    """Difficulty by the nearest neighbours in the features of an encoder.

    One minus the mean of the ``k`` largest cosine similarities to the other images of the same class, `Wicked Oddities
    <https://arxiv.org/abs/2407.10825>`_, where only the target class is known and scored. Where images of several
    classes may be poisoned, each is scored within its own.

    Args:
        encoder: Gives the features; the paper's release uses a ResNet-50 trained by VICReg, at 224 pixels.
        k: Neighbours, at least 1 and fewer than a class has images; the paper's 50.

    Raises:
        ValueError: If ``k`` is not positive; when scoring, if a class has too few images.

    Example:
        >>> from lightning_bd.selection.encoders import RawPixels
        >>> images = torch.tensor([[3, 0], [5, 0], [0, 1]], dtype=torch.uint8).view(3, 1, 1, 2)
        >>> KNNTypicality(RawPixels(), k=1).score(images, torch.zeros(3), 0).tolist()
        [0.0, 0.0, 1.0]
    """

    def __init__(self, encoder: Encoder, k: int = 50) -> None:
        if k < 1:
            raise ValueError(f"Expected argument `k` to be a positive integer, but got {k}.")
        self.encoder = encoder
        self.k = k

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return scores ``(N,)`` float64 in [0, 2] of images ``(N, C, H, W)`` within their classes ``(N,)``."""
        for label, count in zip(*(found.tolist() for found in torch.unique(labels, return_counts=True)), strict=True):
            if count <= self.k:
                raise ValueError(
                    f"Expected more than k = {self.k} images of class {label} to find as many neighbours among, but "
                    f"there are {count}. Lower the scorer's `k`."
                )
        return score_by_class(self.encoder, images, labels, self._score_class)

    def _score_class(self, directions: Tensor) -> Tensor:
        return 1 - mean_neighbour_similarity(directions, self.k)
