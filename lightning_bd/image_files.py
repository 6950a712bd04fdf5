"""Image files, decoded, converted and resized."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ("read_image", "read_images")


def read_image(path: Path, size: int | tuple[int, int], grey: bool = False) -> Tensor:
    """Read one image file as RGB, or in grey.

    Args:
        path: An image file that Pillow reads.
        size: Height and width to resize to (bilinear, antialiased) if they differ; one number for both.
        grey: One channel, the luma of ITU-R 601, instead of three.

    Returns:
        ``(C, H, W)`` uint8.

    Raises:
        ValueError: If the file is not a readable image; the message names it.
    """
    try:
        with Image.open(path) as image:
            pixels = image.convert("L" if grey else "RGB")
    # Pillow reports broken files by any of these.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {path}: {error}. Remove or replace the file.") from error
    height, width = (size, size) if isinstance(size, int) else size
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    array = torch.from_numpy(np.array(pixels))
    return array[None] if grey else array.permute(2, 0, 1)


def read_images(
    files: Sequence[Path], image_shape: tuple[int, int, int], threads: int | None = None, title: str | None = None
) -> Tensor:
    """Read images into memory, all of one shape.

    Args:
        files: The files.
        image_shape: ``(C, H, W)`` that all are resized to (bilinear, antialiased), grey if ``C`` is 1, else RGB.
        threads: Threads that decode; Pillow releases the interpreter lock while it does. ``None``: one per core, at
            most 8.
        title: Of a progress bar, which is shown if it takes seconds; ``None``: no bar.

    Returns:
        ``(N, C, H, W)`` uint8.

    Raises:
        ValueError: If a file is not a readable image; the message names it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (8, 4), (0, 0, 255)).save(Path(folder) / "blue.png")
        ...     read_images([Path(folder) / "blue.png"], (3, 2, 2))[0, :, 0, 0].tolist()
        [0, 0, 255]
    """
    channels, *size = image_shape
    found = torch.empty(len(files), *image_shape, dtype=torch.uint8)

    def fill(row: int) -> None:
        found[row] = read_image(files[row], (size[0], size[1]), grey=channels == 1)

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        rows = pool.map(fill, range(len(files)))
        for _ in tqdm(rows, title, total=len(files), leave=False, delay=3, disable=title is None):
            pass
    return found
