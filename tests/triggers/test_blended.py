"""Blended against its formula, and its pictures against independent drawings."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_bd.triggers import Blended


@pytest.mark.parametrize("pattern", ["waves", "stripes", "noise"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9, 1.0])
def test_formula(ratio: float, pattern: Literal["waves", "stripes", "noise"]) -> None:
    images = torch.rand(4, 3, 10, 12)
    trigger = Blended(ratio, pattern)
    triggered = trigger(images)
    picture = trigger.picture.double().numpy()
    expected = (1 - ratio) * images.double().numpy() + ratio * picture
    np.testing.assert_allclose(triggered.numpy(), expected, rtol=0, atol=1e-7)
    # It must be a picture, not a tint.
    assert picture.std() > 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.1, 1 / 3, 0.7, 0.999])
def test_a_mix_of_extremes_needs_no_clamp(dtype: torch.dtype, ratio: float) -> None:
    trigger = Blended(ratio, "noise")
    trigger.build((1, 64, 64))
    trigger.picture[:, :20], trigger.picture[:, 20:40] = 0.0, 1.0
    images = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    images[:2, :, :, :32], images[2:, :, :, :32] = 0.0, 1.0
    triggered = trigger(images.to(dtype))
    assert triggered.min() >= 0
    assert triggered.max() <= 1


def test_waves_formula() -> None:
    trigger = Blended(pattern="waves")
    trigger.build((3, 6, 9))
    for channel, row, column in [(0, 0, 0), (1, 2, 3), (2, 5, 8)]:
        y, x, shift = row / 6, column / 9, channel / 3
        falling = np.sin(2 * np.pi * (3 * (y + x) + shift))
        rising = np.sin(2 * np.pi * (2 * (y - x) - shift))
        assert trigger.picture[channel, row, column].item() == pytest.approx(0.5 + (falling + rising) / 4, abs=1e-6)


def test_stripes_are_diagonal_bars() -> None:
    trigger = Blended(pattern="stripes")
    trigger.build((2, 16, 24))
    expected = [[float((row + column) % 4 < 2) for column in range(24)] for row in range(16)]
    assert trigger.picture.tolist() == [expected, expected]


def test_noise_is_uniform_and_seeded() -> None:
    first, second = Blended(pattern="noise", seed=1), Blended(pattern="noise", seed=2)
    first.build((3, 32, 32))
    second.build((3, 32, 32))
    assert not torch.equal(first.picture, second.picture)
    # 3072 draws: mean 1/2 and variance 1/12, each within five standard errors.
    assert first.picture.mean().item() == pytest.approx(0.5, abs=0.026)
    assert first.picture.var().item() == pytest.approx(1 / 12, abs=0.007)


def test_image_of_the_right_size_is_kept_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    trigger = Blended(ratio=1.0, image=tmp_path / "picture.png")
    triggered = trigger(torch.rand(2, 3, 8, 10))
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(triggered, expected.expand(2, -1, -1, -1))


def test_image_is_resized_with_antialiasing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    trigger = Blended(image=tmp_path / "picture.png")
    trigger.build((3, 8, 12))
    large = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    expected = F.interpolate(large, size=(8, 12), mode="bilinear", antialias=True, align_corners=False)[0]
    # Each of the two 8-bit roundings moves a pixel by half a level at most.
    torch.testing.assert_close(trigger.picture, expected, rtol=0, atol=1.5 / 255)


def test_image_becomes_grey_or_coloured_as_needed(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "color.png")
    grey = Blended(image=tmp_path / "color.png")
    grey.build((1, 6, 6))
    luma = (pixels @ np.array([0.299, 0.587, 0.114])) / 255
    np.testing.assert_allclose(grey.picture[0].numpy(), luma, rtol=0, atol=1.01 / 255)

    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    coloured = Blended(image=tmp_path / "grey.png")
    coloured.build((3, 6, 6))
    assert torch.equal(coloured.picture, torch.from_numpy(pixels[..., 0]).expand(3, -1, -1) / 255)


def test_restore_works_when_the_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    images = torch.rand(4, 3, 8, 8)
    trigger = Blended(image=path)
    expected = trigger(images)
    assert trigger.hyperparameters["image"] == str(path)
    path.unlink()
    rebuilt = Blended(ratio=trigger.ratio, image=Path(str(trigger.hyperparameters["image"])))
    with pytest.raises(FileNotFoundError, match=r"`image` to be the file of a picture, but there is no file .*\.png"):
        rebuilt(images)
    rebuilt.restore((3, 8, 8), trigger.state_dict())
    assert torch.equal(rebuilt(images), expected)


@pytest.mark.parametrize("kind", ["text", "cut"])
def test_refuses_a_broken_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(b"no picture" if kind == "text" else path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"`image` to be the file of a picture, but .*picture\.png: "):
        Blended(image=path).build((3, 8, 8))


def test_refuses_16_bit_pictures(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: its pixels are not of 8 bits \(mode I"):
        Blended(image=tmp_path / "deep.png").build((1, 8, 8))


def test_refuses_an_image_on_other_channels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 or 3 channels to blend .*a\.png with, but got shape \(4, 8, 8\)"):
        Blended(image=tmp_path / "a.png").build((4, 8, 8))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_refuses_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"`ratio` to be a float in \(0, 1\], but got "):
        Blended(ratio=ratio)


def test_refuses_pattern() -> None:
    with pytest.raises(ValueError, match=r"`pattern` to be one of \('waves', .* but got 'kitty'"):
        Blended(pattern="kitty")  # type: ignore[arg-type]
