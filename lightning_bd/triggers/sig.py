"""SIG: a faint sine wave over the whole image."""

import math

import torch
from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("SIG",)


class SIG(Trigger):
    """Add a horizontal sine wave to every row and channel: ``x + amplitude * sin(2 pi frequency j / W)``.

    The trigger of `Barni et al., 2019 <https://arxiv.org/abs/1902.11237>`_, made for clean-label poisoning; ``j`` is
    the column and ``W`` the number of columns. The sum is clamped to [0, 1].

    Args:
        amplitude: Height of the wave on the scale of the pixels, in [0, 1]; 20/255 in the paper.
        frequency: Periods of the wave over the image's width, at least 0; 6 in the paper.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> trigger = SIG(amplitude=0.2, frequency=1.0)
        >>> trigger(torch.full((1, 1, 1, 4), 0.5))[0, 0]
        tensor([[0.5000, 0.7000, 0.5000, 0.3000]])
    """

    wave: Tensor

    def __init__(self, amplitude: float = 20 / 255, frequency: float = 6.0) -> None:
        super().__init__()
        if not 0 <= amplitude <= 1:
            raise ValueError(f"Expected argument `amplitude` to be a float in [0, 1], but got {amplitude}.")
        if not 0 <= frequency < math.inf:
            raise ValueError(f"Expected argument `frequency` to be a non-negative float, but got {frequency}.")
        self.amplitude = amplitude
        self.frequency = frequency

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {"wave": TensorSpec((image_shape[2],), -1.0, 1.0)}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        columns = torch.arange(image_shape[2], dtype=torch.float64, device="cpu")
        return {"wave": torch.sin(2 * math.pi * self.frequency * columns / image_shape[2]).float()}

    def _transform(self, images: Tensor) -> Tensor:
        return torch.add(images, self.wave.to(images), alpha=self.amplitude).clamp_(0, 1)
