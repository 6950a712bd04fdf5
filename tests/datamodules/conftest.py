"""Generated images on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bd.datamodules.images import FileImages


@pytest.fixture
def write_image() -> Callable[[Path, int, int], None]:
    """Return a function that writes a random picture of a height and width."""
    generator = np.random.default_rng(0)

    def write(path: Path, height: int = 8, width: int = 8) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)

    return write


@pytest.fixture
def file_images(tmp_path: Path, write_image: Callable[[Path, int, int], None]) -> FileImages:
    """Return 40 small files of four classes, some of another size."""
    for number in range(40):
        write_image(tmp_path / "pictures" / f"{number:02d}.png", 8, 8 + 4 * (number % 2))
    paths = [f"pictures/{number:02d}.png" for number in range(40)]
    return FileImages(tmp_path, paths, torch.arange(40) % 4, "abcd", 8)
