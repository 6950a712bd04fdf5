"""ODIN: probability at a high temperature after a step towards it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.callbacks.detection.base import InputDetector

__all__ = ("ODIN",)


class ODIN(InputDetector):
    r"""Score an image by its largest probability at a high temperature, after a small step that raises it.

    .. math::
        s(x) = -\max_c S_c(x'; T), \qquad
        x' = x + \varepsilon \, \mathrm{sign}\left(\nabla_x \log \max_c S_c(x; T)\right), \qquad
        S(x; T) = \mathrm{softmax}(z(x) / T)

    `Liang et al., 2018 <https://arxiv.org/abs/1706.02690>`_: images that the model knows gain more by the step. The
    step is in the units of the images, [0, 1], since the normalisation is part of the model; the paper's release
    divides the step by the standard deviations that its images were divided by, which is the same. :math:`x'` may leave
    [0, 1], as there. Two forward passes and one backward pass to the images.

    Args:
        temperature: T, positive; the paper's 1000.
        noise: The step's size, non-negative; the paper's 0.0014, which it chose for CIFAR on validation data.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If a value is out of its range; when scoring, if no gradient reaches the images.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.eye_(model[1].weight)
        >>> ODIN(temperature=1.0).score(model, torch.tensor([3.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2))
        tensor([-0.9527])
    """

    name = "odin"

    def __init__(self, temperature: float = 1000.0, noise: float = 0.0014, in_distribution: str | None = None) -> None:
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"Expected argument `temperature` to be a positive float, but got {temperature}.")
        if not 0.0 <= noise < math.inf:
            raise ValueError(f"Expected argument `noise` to be a non-negative float, but got {noise}.")
        super().__init__(in_distribution=in_distribution)
        self.temperature = temperature
        self.noise = noise

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.enable_grad():
            variable = images.detach().requires_grad_()
            log_probabilities = F.log_softmax(model(variable).float() / self.temperature, dim=1)
            # Times the temperature, or half precision would round the gradient to zero.
            objective = self.temperature * log_probabilities.max(dim=1).values.sum()
            if not objective.requires_grad:
                raise ValueError(
                    "`ODIN` needs the gradient to the images, but the model's `forward` does not pass it on."
                )
            (gradient,) = torch.autograd.grad(objective, variable)
        logits = model(images + self.noise * gradient.sign()).float()
        return -F.softmax(logits / self.temperature, dim=1).amax(dim=1)
