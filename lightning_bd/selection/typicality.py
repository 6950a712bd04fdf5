"""What scores by features share: normalised features, class by class."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.selection.encoders import Encoder

__all__ = ("score_by_class",)


def score_by_class(encoder: Encoder, images: Tensor, labels: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Score each image among those of its own class.

    Args:
        encoder: Gives the features.
        images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1].
        labels: ``(N,)`` int64.
        score: From normalised features ``(M, D)`` float32 of one class to scores ``(M,)``.

    Returns:
        ``(N,)`` float64.

    Raises:
        ValueError: If the encoder gives features that are not finite.
    """
    features = encoder.features(images)
    if not bool(features.isfinite().all()):
        raise ValueError(
            f"`{type(encoder).__name__}` gives features that are not finite. Its weights may be broken, or made for "
            "other images."
        )
    directions = F.normalize(features, dim=1)
    scores = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().flatten()
        scores[rows] = score(directions.index_select(0, rows)).double()
    return scores
