"""Generalized entropy (GEN)."""

import math

import torch
from torch import Tensor

from lightning_bd.callbacks.detection.base import FeatureDetector

__all__ = ("GEN",)


class GEN(FeatureDetector):
    r"""Score an image by the generalized entropy of its largest probabilities.

    .. math:: s(x) = \sum_{j=1}^{M} p_{(j)}(x)^\gamma \, (1 - p_{(j)}(x))^\gamma, \qquad p_{(1)} \ge p_{(2)} \ge \dots

    The score of `Liu et al., 2023
    <https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html>`_
    is the negative of it. Differs from the paper in how it is computed, by the logarithms of :math:`p` and
    :math:`1 - p`, the latter from the other classes: nothing is rounded to 0 or 1, which a small :math:`\gamma` would
    show.

    Args:
        gamma: Exponent, positive; the paper's 0.1.
        top_classes: M, at least 1, of which there are never more than classes; the paper's 100, for ImageNet.
        layer: Name of a module, for models without a linear layer at their end.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> GEN().score(torch.zeros(2, 1), torch.tensor([[9.0, 0.0], [0.5, 0.0]]))
        tensor([0.8131, 1.7304])
    """

    name = "gen"

    def __init__(
        self,
        gamma: float = 0.1,
        top_classes: int = 100,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if not 0.0 < gamma < math.inf:
            raise ValueError(f"Expected argument `gamma` to be a positive float, but got {gamma}.")
        if top_classes < 1:
            raise ValueError(f"Expected argument `top_classes` to be a positive integer, but got {top_classes}.")
        super().__init__(layer=layer, in_distribution=in_distribution)
        self.gamma = gamma
        self.top_classes = top_classes

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        logits = logits - logits.amax(dim=1, keepdim=True)  # the sum's logarithm loses digits beside a large one
        total = logits.logsumexp(dim=1, keepdim=True)
        top, classes = logits.topk(min(self.top_classes, logits.shape[1]), dim=1)
        log_p = top - total
        # Only the first can be near 1; the others are at most 1/2, where 1 - p keeps its digits.
        rest = logits.scatter(1, classes[:, :1], -math.inf).logsumexp(dim=1, keepdim=True) - total
        log_rest = torch.cat([rest, torch.log1p(-log_p[:, 1:].exp())], dim=1)
        return (self.gamma * (log_p + log_rest)).exp().sum(dim=1)
