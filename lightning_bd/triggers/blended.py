"""Blended: a faint picture over the whole image."""

import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("Blended",)

Pattern = Literal["waves", "stripes", "noise"]


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
        if pattern not in get_args(Pattern):
            raise ValueError(f"Expected argument `pattern` to be one of {get_args(Pattern)}, but got {pattern!r}.")
        self.ratio = ratio
        self.pattern = pattern
        self.image = None if image is None else Path(image)
        self.seed = seed

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {"picture": TensorSpec(image_shape, 0.0, 1.0)}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        if self.image is not None:
            return {"picture": _read_picture(self.image, image_shape)}
        if self.pattern == "noise":
            generator = torch.Generator().manual_seed(self.seed)
            return {"picture": torch.rand(image_shape, generator=generator, dtype=torch.float32, device="cpu")}
        draw = _waves if self.pattern == "waves" else _stripes
        return {"picture": draw(*image_shape)}

    def _transform(self, images: Tensor) -> Tensor:
        # A convex mix cannot leave [0, 1], and `lerp` rounds towards neither side of it: no clamp.
        return torch.lerp(images, self.picture.to(images), self.ratio)


def _waves(channels: int, height: int, width: int) -> Tensor:
    """Draw two crossed sine waves of 3 and 2 periods; a third of a period lies between neighbouring channels."""
    rows = torch.arange(height, dtype=torch.float64, device="cpu").view(1, -1, 1) / height
    columns = torch.arange(width, dtype=torch.float64, device="cpu").view(1, 1, -1) / width
    shift = torch.arange(channels, dtype=torch.float64, device="cpu").view(-1, 1, 1) / 3
    falling = torch.sin(2 * math.pi * (3 * (rows + columns) + shift))
    rising = torch.sin(2 * math.pi * (2 * (rows - columns) - shift))
    return (0.5 + 0.25 * (falling + rising)).float()


def _stripes(channels: int, height: int, width: int) -> Tensor:
    """Draw diagonal bars, an eighth of the image's shorter side wide."""
    bar = max(1, min(height, width) // 8)
    rows = torch.arange(height, device="cpu").view(-1, 1)
    columns = torch.arange(width, device="cpu").view(1, -1)
    white = (rows + columns) // bar % 2 == 0
    return white.float().expand(channels, -1, -1).contiguous()


def _read_picture(path: Path, image_shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise ValueError(f"Expected images of 1 or 3 channels to blend {path} with, but got shape {image_shape}.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected argument `image` to be the file of a picture, but there is no file {path}.")
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are not of 8 bits (mode {file.mode})")
            picture = file.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    # Pillow reports broken files by any of these.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Expected argument `image` to be the file of a picture, but {path}: {error}.") from error
    pixels = np.array(picture, dtype=np.float32).reshape(height, width, channels) / np.float32(255)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
