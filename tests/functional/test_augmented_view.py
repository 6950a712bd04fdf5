"""Random views: geometry read off a ramp, colours against torchvision's, and how often."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from lightning_bd.functional.augmented_view import augmented_view

SIDE = 32
COUNT = 2000


def view(images: Tensor, seed: int = 0, smallest_crop: float = 1.0, strength: float = 0.0) -> Tensor:
    return augmented_view(images, torch.Generator().manual_seed(seed), smallest_crop, strength)


def ramps(count: int = COUNT) -> Tensor:
    """Two channels: a pixel's column and its row, in [0, 1]."""
    steps = (torch.arange(SIDE) + 0.5) / SIDE
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy")).expand(count, -1, -1, -1)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_views_are_images(channels: int) -> None:
    images = torch.rand(64, channels, 9, 7, generator=torch.Generator().manual_seed(0))
    found = view(images, smallest_crop=0.08, strength=1.0)
    assert found.shape == images.shape
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    assert all((found[row] - images[row]).abs().max() > 0.01 for row in range(64))


def test_draws_are_the_generators_alone() -> None:
    images = ramps(4)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    first, second = (augmented_view(images, generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, view(images, smallest_crop=0.08, strength=0.5))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("smallest", [0.08, 0.5])
def test_crops(smallest: float) -> None:
    """Each is a rectangle inside the image, of the area and shape asked for, mirrored half of the time."""
    found = view(ramps(), smallest_crop=smallest)
    middle = SIDE // 2
    across, down = found[:, 0, middle], found[:, 1, :, middle]
    # One row of a crop is a line, but for the border, whose outer half pixel is repeated.
    slope = across[:, middle] - across[:, middle - 1]
    inner = across[:, 2:-2]
    assert torch.allclose(inner.diff(dim=1), slope[:, None].expand(-1, inner.shape[1] - 1), atol=1e-4)
    assert torch.allclose(found[:, 0], across[:, None], atol=1e-5)
    width, height = slope.abs() * SIDE, (down[:, middle] - down[:, middle - 1]) * SIDE
    assert float(height.min()) > 0
    assert 0.45 < float((slope < 0).float().mean()) < 0.55
    area, shape = width * height, width / height
    whole = (width < 0.999) & (height < 0.999)
    assert area[whole].min() == pytest.approx(smallest, abs=0.03)
    assert area.max() <= 1.001
    assert 0.75 <= float(shape[whole].min()) < 0.78
    assert 1.29 < float(shape[whole].max()) <= 1.334
    # Anywhere: the centre's distance from the middle, as a share of what is possible.
    room = (across[:, middle - 1 : middle + 1].mean(dim=1) - 0.5)[whole] / (0.5 - width[whole] / 2)
    assert float(room.min()) < -0.95
    assert float(room.max()) > 0.95
    assert abs(float(room.mean())) < 0.06


def test_without_strength_colours_stay_but_for_the_grey_ones() -> None:
    colour = torch.tensor([0.9, 0.4, 0.1])
    images = colour[:, None, None].expand(COUNT, 3, 4, 4)
    found = view(images)
    grey = T.rgb_to_grayscale(colour[:, None, None], 3)
    is_grey = (found - grey).abs().amax(dim=(1, 2, 3)) < 1e-3
    assert 0.17 < float(is_grey.float().mean()) < 0.23
    assert torch.allclose(found[~is_grey], images[~is_grey], atol=1e-4)


def chroma(image: Tensor) -> Tensor:
    """NTSC's two axes of colour, as one complex number."""
    red, green, blue = image
    return torch.complex(0.5959 * red - 0.2746 * green - 0.3213 * blue, 0.2115 * red - 0.5227 * green + 0.3112 * blue)


def test_jitter_is_torchvisions() -> None:
    """By the factors that the generator draws; a hue is an angle between the two axes of colour."""
    strength = 0.5
    images = torch.rand(200, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.4
    draws = torch.rand(11, len(images), generator=torch.Generator().manual_seed(0))
    found = view(images, strength=strength)
    # The crops alone.
    cropped = view(images)
    checked = 0
    for row, (expected, draw) in enumerate(zip(cropped, draws.T, strict=True)):
        if draw[10] < 0.2:
            continue
        if draw[9] < 0.8:
            brightness, contrast, saturation = (1 + 0.8 * strength * (2 * draw[5:8] - 1)).tolist()
            jittered = T.adjust_contrast(T.adjust_brightness(expected, brightness), contrast)
            jittered = T.adjust_saturation(jittered, saturation)
            turn = torch.polar(torch.ones(()), 0.2 * strength * 2 * torch.pi * (2 * draw[8] - 1))
            assert torch.allclose(chroma(found[row]), turn * chroma(jittered), atol=2e-3)
            assert torch.allclose(T.rgb_to_grayscale(found[row]), T.rgb_to_grayscale(jittered), atol=2e-3)
            checked += 1
        else:
            assert torch.allclose(found[row], expected, atol=1e-4)
    assert 0.7 * 0.8 * len(images) < checked < 0.9 * 0.8 * len(images)


def test_hues_turn_to_both_sides() -> None:
    colour = torch.tensor([0.6, 0.4, 0.4])
    images = colour[:, None, None].expand(COUNT, 3, 2, 2)
    found = view(images, strength=0.5)[:, :, 0, 0]
    # Red becomes warmer or bluer.
    tint = (found[:, 1] - found[:, 2]) / (found[:, 0] - found.amin(dim=1)).clamp_min(1e-3)
    assert 0.35 < float(tint.max()) < 1
    assert -1 < float(tint.min()) < -0.35


def test_grey_images_keep_one_channel() -> None:
    images = torch.rand(300, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    draws = torch.rand(11, len(images), generator=torch.Generator().manual_seed(0))
    found = view(images, strength=1.0)
    for row, (expected, draw) in enumerate(zip(view(images), draws.T, strict=True)):
        if draw[9] < 0.8:
            brightness, contrast = (1 + 0.8 * (2 * draw[5:7] - 1)).tolist()
            brighter = (expected * brightness).clamp(0, 1)
            jittered = (brighter.mean() + contrast * (brighter - brighter.mean())).clamp(0, 1)
        else:
            jittered = expected
        assert torch.allclose(found[row], jittered, atol=1e-4)
