"""LowFrequency: a smooth pattern without high frequencies."""

import math

import torch
from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("LowFrequency",)


class LowFrequency(Trigger):
    r"""Add a smooth pattern over the whole image: ``x + strength * pattern``, clamped to [0, 1].

    The trigger that BackdoorBench calls LF, after `Zeng et al., 2021 <https://arxiv.org/abs/2104.03413>`_: the spectra
    of most triggers have high frequencies that natural images lack and that a detector finds, so the pattern has low
    ones only. It is a sum of the cosines of the discrete cosine transform (DCT-II) whose indices along both sides are
    below ``cutoff``, without the constant one, with normal weights per channel; its largest absolute value is 1.

    Differs from the paper, where the pattern is optimised against a trained model under a low-pass constraint: here it
    is drawn from ``seed`` and knows no model. It is as smooth, but a model learns it from the poisoned images alone.

    Args:
        strength: Largest change of a pixel (the L-infinity norm), in [0, 1]. The default is ours: the released trigger
            is learned, and a drawn one needs more.
        cutoff: Cosines per side, at least 2 and at most the image's shorter side; index ``k`` has ``k / 2`` periods
            over the image.
        seed: Seed of the weights.

    Raises:
        ValueError: If an argument is out of its range; when built, if ``cutoff`` exceeds a side of the images.

    Example:
        >>> trigger = LowFrequency(strength=0.1, cutoff=3)
        >>> change = trigger(torch.full((1, 3, 32, 32), 0.5)) - 0.5
        >>> round(change.abs().max().item(), 4), bool(change.diff(dim=3).abs().max() < 0.03)
        (0.1, True)
    """

    wave: Tensor

    def __init__(self, strength: float = 32 / 255, cutoff: int = 8, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= strength <= 1:
            raise ValueError(f"Expected argument `strength` to be a float in [0, 1], but got {strength}.")
        if not isinstance(cutoff, int) or cutoff < 2:
            raise ValueError(f"Expected argument `cutoff` to be an integer of at least 2, but got {cutoff}.")
        self.strength = strength
        self.cutoff = cutoff
        self.seed = seed

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        if self.cutoff > min(image_shape[1:]):
            raise ValueError(
                f"Expected argument `cutoff` to be at most the shorter side of the image's {image_shape[1]} x "
                f"{image_shape[2]} pixels, but got {self.cutoff}."
            )
        return {"wave": TensorSpec(image_shape, -1.0, 1.0)}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        channels, height, width = image_shape
        generator = torch.Generator().manual_seed(self.seed)
        shape = (channels, self.cutoff, self.cutoff)
        weights = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        # The constant cosine would make the whole image brighter or darker.
        weights[:, 0, 0] = 0
        wave = _cosines(height, self.cutoff).T @ weights @ _cosines(width, self.cutoff)
        return {"wave": (wave / wave.abs().max()).float()}

    def _transform(self, images: Tensor) -> Tensor:
        return torch.add(images, self.wave.to(images), alpha=self.strength).clamp_(0, 1)


def _cosines(length: int, count: int) -> Tensor:
    """Return the first ``count`` functions of the DCT-II on ``length`` points, ``(count, length)`` float64."""
    points = torch.arange(length, dtype=torch.float64, device="cpu") + 0.5
    indices = torch.arange(count, dtype=torch.float64, device="cpu").view(-1, 1)
    return torch.cos(math.pi / length * indices * points)
