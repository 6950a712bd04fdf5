"""Blended: a faint picture over the whole image."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger
from lightning_bd.triggers.pictures import Pattern, check_pattern, make_picture

__all__ = ("Blended",)


class Blended(Trigger):
    r"""Mix a fixed picture into the whole image: ``(1 - ratio) * x + ratio * picture``.

    The trigger of `Chen et al., 2017 <https://arxiv.org/abs/1712.05526>`_, who blend in a cartoon or uniform noise. The
    picture is drawn by code, so that a run needs no file, or is read from ``image``.

    Args:
        ratio: Weight of the picture, in (0, 1]. 0.2 in the paper and in the field's benchmarks.
        pattern: ``"waves"`` (two crossed sine waves, shifted between channels), ``"stripes"`` (diagonal black and
            white bars) or ``"noise"`` (uniform in [0, 1] per pixel and channel, drawn from ``seed``).
        image: File of a picture to blend in place of ``pattern``. It is resized to the images (bilinear with
            antialiasing) and made grey for images of one channel. It is read once, when the trigger is built; after
            that its pixels travel with the trigger.
        seed: Seed of ``"noise"``; nothing else uses it.

    Raises:
        ValueError: If an argument is out of its range; when built, if the file is no 8-bit picture or the images have
            neither 1 nor 3 channels to put it on.
        FileNotFoundError: When built, if the file does not exist.

    Example:
        >>> trigger = Blended(ratio=0.2, pattern="stripes")
        >>> trigger(torch.full((1, 1, 2, 4), 0.5))[0, 0]
        tensor([[0.6000, 0.4000, 0.6000, 0.4000],
                [0.4000, 0.6000, 0.4000, 0.6000]])
    """

    picture: Tensor

    def __init__(
        self, ratio: float = 0.2, pattern: Pattern = "waves", image: Path | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"Expected argument `ratio` to be a float in (0, 1], but got {ratio}.")
        check_pattern(pattern)
        self.ratio = ratio
        self.pattern = pattern
        self.image = None if image is None else Path(image)
        self.seed = seed

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {"picture": TensorSpec(image_shape, 0.0, 1.0)}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        return {"picture": make_picture(self.pattern, self.image, self.seed, image_shape)}

    def _transform(self, images: Tensor) -> Tensor:
        # A convex mix cannot leave [0, 1], and `lerp` rounds towards neither side of it: no clamp.
        return torch.lerp(images, self.picture.to(images), self.ratio)
