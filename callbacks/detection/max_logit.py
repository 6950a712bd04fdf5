"""Largest logit."""

from torch import Tensor

from lightning_bd.callbacks.detection.base import FeatureDetector

__all__ = ("MaxLogit",)


class MaxLogit(FeatureDetector):
    r"""Score an image by how small its largest logit is.

    .. math:: s(x) = -\max_c z_c(x)

    `Hendrycks et al., 2022 <https://arxiv.org/abs/1911.11132>`_. Unlike a probability it keeps the size of the logits,
    and it does not spread over many similar classes.

    Args:
        layer: Name of a module, for models without a linear layer at their end.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Example:
        >>> import torch
        >>> MaxLogit().score(torch.zeros(2, 1), torch.tensor([[5.0, 1.0], [0.5, 0.0]]))
        tensor([-5.0000, -0.5000])
    """

    name = "max_logit"

    def __init__(self, layer: str | None = None, in_distribution: str | None = None) -> None:
        super().__init__(layer=layer, in_distribution=in_distribution)

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        return -logits.amax(dim=1)
