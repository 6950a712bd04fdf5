"""WaNet against a warp in numpy and scipy, with the cubic convolution written out."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor

from lightning_bd.triggers import WaNet

Array = npt.NDArray[np.float64]


def upsample_matrix(points: int, size: int) -> Array:
    """Cubic convolution (a = -0.75, ends repeated) of ``points`` samples at ``size`` positions, ends on ends."""
    matrix = np.zeros((size, points))
    for row in range(size):
        position = row * (points - 1) / (size - 1)
        for neighbour in range(int(position) - 1, int(position) + 3):
            t = abs(position - neighbour)
            near = 1.25 * t**3 - 2.25 * t**2 + 1
            far = -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3
            matrix[row, min(max(neighbour, 0), points - 1)] += near if t <= 1 else far if t < 2 else 0.0
    return matrix


def reference_positions(trigger: WaNet, height: int, width: int) -> Array:
    """Positions (H, W, 2) as (x, y) in [-1, 1], from the paper's equations; only the uniform draw is torch's."""
    k = trigger.grid_size
    draw = torch.rand(1, 2, k, k, generator=torch.Generator().manual_seed(trigger.seed))
    coarse = draw[0].double().numpy() * 2 - 1
    coarse /= np.abs(coarse).mean()
    field = upsample_matrix(k, height) @ coarse @ upsample_matrix(k, width).T
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    moved = np.stack([columns, rows], axis=-1) + trigger.strength * field.transpose(1, 2, 0) / height
    return np.asarray(np.clip(moved * trigger.grid_rescale, -1, 1))


def read(image: Array, positions: Array) -> Array:
    """Read one image (C, H, W) bilinearly at (x, y) positions in [-1, 1]."""
    _, height, width = image.shape
    where = [(positions[..., 1] + 1) / 2 * (height - 1), (positions[..., 0] + 1) / 2 * (width - 1)]
    return np.stack([map_coordinates(channel, where, order=1, mode="nearest") for channel in image])


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "trigger",
    [WaNet(), WaNet(grid_size=2, seed=1), WaNet(grid_size=6, strength=3.0, seed=2), WaNet(seed=3, grid_rescale=0.95)],
    ids=repr,
)
def test_warp(trigger: WaNet, images: Tensor) -> None:
    positions = reference_positions(trigger, 24, 20)
    triggered = trigger(images).numpy()
    np.testing.assert_allclose(trigger.grid.numpy(), positions, rtol=0, atol=2e-6)
    for image, warped in zip(images.double().numpy(), triggered, strict=True):
        np.testing.assert_allclose(warped, read(image, positions), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 3), (5, 3), (16, 3), (17, 1), (64, 3), (7, 17)])
def test_grouped_planes_are_read_as_each_image_by_itself(batch: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, channels, 13, 18, generator=generator, requires_grad=True)
    weights = torch.rand(batch, channels, 13, 18, generator=generator)
    trigger = WaNet(strength=2.0)
    triggered = trigger(images)
    plain = F.grid_sample(images, trigger.grid.expand(batch, -1, -1, -1), align_corners=True).clamp(0, 1)
    assert torch.equal(triggered, plain)
    gradients = [torch.autograd.grad((each * weights).sum(), images)[0] for each in (triggered, plain)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_cover_adds_noise_per_image_to_the_field(images: Tensor) -> None:
    trigger = WaNet(strength=0.75, seed=1)
    covers = trigger.cover(images, torch.Generator().manual_seed(5))
    draw = torch.rand(3, 24, 20, 2, generator=torch.Generator().manual_seed(5)).double().numpy()
    for image, cover, uniform in zip(images.double().numpy(), covers.numpy(), draw, strict=True):
        positions = np.clip(reference_positions(trigger, 24, 20) + (uniform * 2 - 1) / 24, -1, 1)
        np.testing.assert_allclose(cover, read(image, positions), rtol=0, atol=5e-5)


def test_cover_differs_between_images_and_draws_from_its_generator_alone(images: Tensor) -> None:
    trigger = WaNet()
    same = images[:1].expand(2, -1, -1, -1).clone()
    before, state = same.clone(), torch.get_rng_state()
    covers = trigger.cover(same, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same, before)
    assert not torch.equal(covers[0], covers[1])
    assert not torch.equal(covers, trigger(same))
    assert torch.equal(covers, trigger.cover(same, torch.Generator().manual_seed(0)))
    assert not torch.equal(covers, trigger.cover(same, torch.Generator().manual_seed(1)))


def test_cover_without_a_generator_follows_the_global_seed(images: Tensor) -> None:
    trigger = WaNet()
    torch.manual_seed(5)
    covers = trigger.cover(images)
    assert torch.equal(covers, trigger.cover(images, torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cover_keeps_dtype_and_range(dtype: torch.dtype) -> None:
    white = torch.ones(4, 3, 24, 20, dtype=dtype)
    covers = WaNet().cover(white, torch.Generator().manual_seed(0))
    assert covers.dtype == dtype
    assert covers.max() <= 1
    assert covers.min() > 0.99


def test_no_strength_changes_almost_nothing(images: Tensor) -> None:
    # Reading at the identity's rounded positions is not exact.
    torch.testing.assert_close(WaNet(strength=0.0)(images), images, rtol=0, atol=1e-5)


def test_white_stays_within_range() -> None:
    white = torch.ones(1, 1, 32, 32)
    for seed in range(20):
        assert WaNet(strength=1.0, seed=seed)(white).max() <= 1


def test_seeds_differ(images: Tensor) -> None:
    assert not torch.equal(WaNet(seed=0)(images), WaNet(seed=1)(images))


@pytest.mark.parametrize("grid_size", [0, -1, 2.5])
def test_refuses_grid_size(grid_size: int) -> None:
    with pytest.raises(ValueError, match="`grid_size` to be a positive integer, but got "):
        WaNet(grid_size=grid_size)


@pytest.mark.parametrize("strength", [-0.5, float("inf"), float("nan")])
def test_refuses_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="`strength` to be a non-negative float, but got "):
        WaNet(strength=strength)


@pytest.mark.parametrize("grid_rescale", [0.0, -1.0, 1.5, float("nan")])
def test_refuses_grid_rescale(grid_rescale: float) -> None:
    with pytest.raises(ValueError, match=r"`grid_rescale` to be a float in \(0, 1\], but got "):
        WaNet(grid_rescale=grid_rescale)
