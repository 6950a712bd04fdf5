"""Images in files of any size, read as one tensor."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ("read_images",)


def read_images(files: Sequence[Path], image_shape: tuple[int, int, int]) -> Tensor:
    """Read images into memory, all of one shape.

    Args:
        files: The files.
        image_shape: ``(C, H, W)`` that all are resized to (bilinear, antialiased), grey if ``C`` is 1, else RGB.

    Returns:
        ``(N, C, H, W)`` uint8.

    Raises:
        ValueError: If a file cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (8, 4), (0, 0, 255)).save(Path(folder) / "blue.png")
        ...     read_images([Path(folder) / "blue.png"], (3, 2, 2))[0, :, 0, 0].tolist()
        [0, 0, 255]
    """
    channels, height, width = image_shape
    found = torch.empty(len(files), *image_shape, dtype=torch.uint8)
    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        arrays = pool.map(lambda file: _decoded(file, "L" if channels == 1 else "RGB", (width, height)), files)
        for row, array in enumerate(tqdm(arrays, "other data", total=len(files), leave=False, delay=3)):
            pixels = torch.from_numpy(array)
            found[row] = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return found


def _decoded(file: Path, mode: str, size: tuple[int, int]) -> "np.typing.NDArray[np.uint8]":
    try:
        with Image.open(file) as image:
            pixels = image.convert(mode)
    # Pillow reports broken files by any of these.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {file}: {error}. Remove or replace the file.") from error
    return np.array(pixels if pixels.size == size else pixels.resize(size, Image.Resampling.BILINEAR))
