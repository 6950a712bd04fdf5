"""Energy of the logits."""

import math

import torch
from torch import Tensor

from lightning_bd.callbacks.detection.base import FeatureDetector

__all__ = ("Energy", "energy_of_logits")


def energy_of_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Free energy :math:`-T \log \sum_c e^{z_c / T}` of each row; the largest logit is taken out of the exponentials.

    Args:
        logits: ``(B, K)``, floating.
        temperature: T, positive.

    Returns:
        ``(B,)``, of the logits' dtype.

    Example:
        >>> energy_of_logits(torch.tensor([[10000.0, 10000.0], [0.0, 0.0]]))
        tensor([-1.0001e+04, -6.9315e-01])
    """
    return -temperature * torch.logsumexp(logits / temperature, dim=1)


class Energy(FeatureDetector):
    r"""Score an image by the free energy of its logits.

    .. math:: s(x) = -T \log \sum_c e^{z_c(x) / T}

    `Liu et al., 2020 <https://arxiv.org/abs/2010.03759>`_, whose score is the negative of it.

    Args:
        temperature: T, positive; the paper's 1.
        layer: Name of a module, for models without a linear layer at their end.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If the temperature is not positive and finite.

    Example:
        >>> Energy().score(torch.zeros(2, 1), torch.tensor([[5.0, 1.0], [0.5, 0.0]]))
        tensor([-5.0181, -0.9741])
    """

    name = "energy"

    def __init__(self, temperature: float = 1.0, layer: str | None = None, in_distribution: str | None = None) -> None:
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"Expected argument `temperature` to be a positive float, but got {temperature}.")
        super().__init__(layer=layer, in_distribution=in_distribution)
        self.temperature = temperature

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        return energy_of_logits(logits, self.temperature)
