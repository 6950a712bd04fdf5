"""Pictures that triggers blend into images: drawn by code, or read from a file."""

import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ("Pattern", "check_pattern", "make_picture")

Pattern = Literal["waves", "stripes", "noise"]


def check_pattern(pattern: str) -> None:
    """Raise ``ValueError`` if ``pattern`` is no :data:`Pattern`."""
    if pattern not in get_args(Pattern):
        raise ValueError(f"Expected argument `pattern` to be one of {get_args(Pattern)}, but got {pattern!r}.")


def make_picture(pattern: Pattern, image: Path | None, seed: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Draw or read a picture.

    Args:
        pattern: ``"waves"`` (two crossed sine waves, shifted between channels), ``"stripes"`` (diagonal black and
            white bars) or ``"noise"`` (uniform in [0, 1] per pixel and channel, drawn from ``seed``).
        image: File of a picture to read in place of ``pattern``, resized (bilinear with antialiasing) and made grey
            for one channel.
        seed: Seed of ``"noise"``; nothing else uses it.
        image_shape: ``(C, H, W)``.

    Returns:
        ``(C, H, W)`` float32 in [0, 1].

    Raises:
        ValueError: If the file is no 8-bit picture, or the shape has neither 1 nor 3 channels to put it on.
        FileNotFoundError: If the file does not exist.
    """
    if image is not None:
        return _read_picture(image, image_shape)
    if pattern == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(image_shape, generator=generator, dtype=torch.float32, device="cpu")
    draw = _waves if pattern == "waves" else _stripes
    return draw(*image_shape)


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
