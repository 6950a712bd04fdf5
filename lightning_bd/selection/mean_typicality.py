"""How far an image points away from the mean of its class."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.encoders import Encoder
from lightning_bd.selection.typicality import score_by_class

__all__ = ("MeanTypicality",)


class MeanTypicality(SampleScorer):
    """Difficulty by the mean direction of the class in the features of an encoder.

    One minus the cosine similarity to the mean of the class's normalised features, a variant in `Wicked Oddities
    <https://arxiv.org/abs/2407.10825>`_. Where images of several classes may be poisoned, each is scored within its
    own.

    Args:
        encoder: Gives the features; the paper's release uses a ResNet-50 trained by VICReg, at 224 pixels.

    Example:
        >>> from lightning_bd.selection.encoders import RawPixels
        >>> images = torch.tensor([[9, 0], [9, 0], [0, 9]], dtype=torch.uint8).view(3, 1, 1, 2)
        >>> MeanTypicality(RawPixels()).score(images, torch.zeros(3), 0).argmax().item()
        2
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return scores ``(N,)`` float64 in [0, 2] of images ``(N, C, H, W)`` within their classes ``(N,)``."""
        return score_by_class(self.encoder, images, labels, _score_class)


def _score_class(directions: Tensor) -> Tensor:
    wide = directions.to(torch.float64)
    return 1 - wide @ F.normalize(wide.mean(dim=0), dim=0)
