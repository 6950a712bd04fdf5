"""Image files against Pillow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_bd.image_files import read_image, read_images


def write_image(path: Path, height: int = 16, width: int = 16) -> None:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_many_are_read_as_pillow_reads_them(tmp_path: Path, mode: str) -> None:
    files = []
    for number in range(130):
        files.append(tmp_path / f"{number}.png")
        write_image(files[-1], 4 + number % 3, 5 + number % 4)
    found = read_images(files, (len(mode), 6, 5))
    assert found.shape == (130, len(mode), 6, 5)
    for file, image in zip(files, found, strict=True):
        expected = np.array(Image.open(file).convert(mode).resize((5, 6), Image.Resampling.BILINEAR))
        assert np.array_equal(image.permute(1, 2, 0).squeeze(2).numpy(), expected)


def test_none_are_read() -> None:
    assert read_images([], (3, 4, 4)).shape == (0, 3, 4, 4)


def test_names_a_broken_one_among_many(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(9)]
    for file in files:
        write_image(file)
    files[5].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"Cannot read the image .*5\.png"):
        read_images(files, (3, 16, 16))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (4, 4)).save(path)
    assert read_image(path, 4).shape == (3, 4, 4)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", None, b"P6 4 4 255\n\0"])
def test_names_a_corrupt_image(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    write_image(path)
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=rf"Cannot read the image {path}: .* Remove or replace the file\."):
        read_image(path, 16)


def test_names_a_missing_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Cannot read the image {tmp_path / 'none.png'}: "):
        read_image(tmp_path / "none.png", 8)


def test_names_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"Cannot read the image .*large\.png: .*decompression bomb"):
        read_image(tmp_path / "large.png", 16)
