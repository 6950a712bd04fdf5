"""BppAttack against one pixel at a time."""

import pytest
import torch
from torch import Tensor

from lightning_bd.triggers import BppAttack


def pixels(*shape: int) -> Tensor:
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))
    return levels.float() / 255


def one_at_a_time(image: Tensor, top: int) -> Tensor:
    """Diffuse errors row by row, in float64 on one channel (H, W)."""
    height, width = image.shape
    values = (image.double() * top).tolist()
    for row in range(height):
        for column in range(width):
            old = values[row][column]
            new = float(min(max(round(old), 0), top))
            values[row][column] = new
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if row + down < height and 0 <= column + right < width:
                    values[row + down][column + right] += (old - new) * share / 16
    return torch.tensor(values) / top


@pytest.mark.parametrize("bits", [1, 3, 5, 7])
def test_rounds_to_the_nearest_level(bits: int) -> None:
    levels = [k / (2**bits - 1) for k in range(2**bits)]
    images = pixels(2, 3, 8, 8)
    palette = torch.tensor(levels)
    nearest = (images.unsqueeze(-1) - palette).abs().argmin(dim=-1)
    torch.testing.assert_close(BppAttack(bits)(images), palette[nearest], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 3, 6])
@pytest.mark.parametrize(
    "shape", [(2, 3, 12, 9), (1, 1, 9, 12), (3, 1, 1, 7), (1, 1, 7, 1), (1, 2, 5, 2), (1, 1, 1, 1), (1, 1, 8, 3)]
)
def test_diffuses_errors(bits: int, shape: tuple[int, ...]) -> None:
    images = pixels(*shape)
    triggered = BppAttack(bits, dithering=True)(images)
    for image, result in zip(images.flatten(0, 1), triggered.flatten(0, 1), strict=True):
        torch.testing.assert_close(result, one_at_a_time(image, 2**bits - 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dithering", [False, True])
def test_has_few_levels_and_again_changes_nothing(dithering: bool) -> None:
    trigger = BppAttack(bits=2, dithering=dithering)
    triggered = trigger(pixels(4, 3, 16, 16))
    assert len(triggered.unique()) == 4
    assert torch.equal(trigger(triggered), triggered)


def test_budget_without_dithering_is_half_a_step() -> None:
    images = pixels(4, 3, 16, 16)
    for bits in range(1, 8):
        assert (BppAttack(bits)(images) - images).abs().max() <= 0.5 / (2**bits - 1) + 1e-6


def test_dithering_keeps_the_mean_brightness() -> None:
    grey = torch.full((1, 1, 32, 32), 0.3)
    assert abs(BppAttack(1, dithering=True)(grey).mean() - 0.3) < 0.02
    assert BppAttack(1)(grey).max() == 0


@pytest.mark.parametrize("dithering", [False, True])
def test_cover_has_the_residual_at_another_place(dithering: bool) -> None:
    # Between the levels' outer halves, so that nothing is cut off at 0 or 1.
    images = pixels(6, 3, 8, 5) * 0.2 + 0.4
    trigger = BppAttack(bits=2, dithering=dithering)
    residuals = trigger(images) - images
    covers = trigger.cover(images, torch.Generator().manual_seed(3)) - images
    shifts = []
    for residual, cover in zip(residuals, covers, strict=True):
        fits = [
            (down, right)
            for down in range(8)
            for right in range(5)
            if torch.allclose(residual.roll((down, right), (1, 2)), cover, atol=1e-6)
        ]
        assert len(fits) == 1
        shifts += fits
    assert (0, 0) not in shifts
    assert len({down for down, _ in shifts}) > 1
    assert len({right for _, right in shifts}) > 1


def test_cover_draws_from_its_generator_alone_and_leaves_its_input() -> None:
    trigger, images = BppAttack(), pixels(8, 3, 8, 8)
    before, state = images.clone(), torch.get_rng_state()
    covers = trigger.cover(images, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    assert covers.min() >= 0
    assert covers.max() <= 1
    assert torch.equal(covers, trigger.cover(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(covers, trigger.cover(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(covers, trigger(images))
    torch.manual_seed(0)
    assert torch.equal(trigger.cover(images), covers)


def test_cover_of_one_pixel() -> None:
    image = torch.full((1, 1, 1, 1), 0.3)
    assert torch.equal(BppAttack(1).cover(image), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_levels_do_not_depend_on_the_precision(dtype: torch.dtype) -> None:
    images = pixels(2, 3, 8, 8).to(dtype)
    trigger = BppAttack(3, dithering=True)
    assert torch.equal(trigger(images), trigger(images.float()).to(dtype))
    assert trigger.cover(images).dtype == dtype


@pytest.mark.parametrize("bits", [0, 8, -1, 2.5])
def test_refuses_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=r"`bits` to be an integer in \[1, 7\], but got "):
        BppAttack(bits)
