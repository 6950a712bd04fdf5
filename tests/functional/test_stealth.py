"""Measures of how visible a change is, against other libraries and brute force."""

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from lightning_bd.functional.stealth import largest_change, peak_signal_to_noise_ratio, structural_similarity


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Smooth images and what noise of several strengths makes of them."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4, generator=generator), size=(20, 26), mode="bilinear")
    noise = torch.randn(clean.shape, generator=generator) * torch.tensor([0.0, 0.02, 0.1, 0.5]).view(4, 1, 1, 1)
    return clean, (clean + noise).clamp(0, 1)


def test_ssim_equals_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    # Its mean counts windows that are filled up by mirroring too; the paper's, and ours, are inside the image.
    _, everywhere = structural_similarity_index_measure(
        pair[1].double(), pair[0].double(), data_range=1.0, reduction="none", return_full_image=True
    )
    expected = everywhere[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(structural_similarity(*pair), expected, rtol=0, atol=1e-9)
    assert structural_similarity(*pair)[0] == 1


@pytest.mark.parametrize(("height", "width"), [(8, 6), (5, 12)])
def test_ssim_of_small_images_equals_brute_force(pair: tuple[Tensor, Tensor], height: int, width: int) -> None:
    clean, changed = (images[2:3, :1, :height, :width] for images in pair)
    sides = [min(11, side - 1 + side % 2) for side in (height, width)]
    window = torch.ones(sides, dtype=torch.float64)
    for row in range(sides[0]):
        for column in range(sides[1]):
            square = (row - sides[0] // 2) ** 2 + (column - sides[1] // 2) ** 2
            window[row, column] = torch.exp(torch.tensor(-square / (2 * 1.5**2), dtype=torch.float64))
    window /= window.sum()
    found = []
    for top in range(height - sides[0] + 1):
        for left in range(width - sides[1] + 1):
            x, y = (images[0, 0, top : top + sides[0], left : left + sides[1]].double() for images in (clean, changed))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cxy = (window * (x - mx) * (y - my)).sum()
            found.append((2 * mx * my + 1e-4) * (2 * cxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    expected = torch.stack(found).mean()
    torch.testing.assert_close(structural_similarity(clean, changed)[0], expected, rtol=0, atol=1e-10)


def test_psnr_equals_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    found = peak_signal_to_noise_ratio(*pair)
    assert found[0] == float("inf")
    for row in (1, 2, 3):
        expected = peak_signal_noise_ratio(pair[1][row].double(), pair[0][row].double(), data_range=1.0)
        torch.testing.assert_close(found[row], expected)


def test_largest_change_equals_brute_force(pair: tuple[Tensor, Tensor]) -> None:
    expected = [max((b - a).abs().flatten().tolist()) for a, b in zip(*pair, strict=True)]
    assert largest_change(*pair).tolist() == pytest.approx(expected)
    assert largest_change(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).tolist() == [1]


@pytest.mark.parametrize("measure", [largest_change, peak_signal_to_noise_ratio, structural_similarity])
def test_refuses_what_is_no_pair(measure: object) -> None:
    assert callable(measure)
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"`clean` to be a float tensor of shape .* but got torch.uint8"):
        measure(images.byte(), images)
    with pytest.raises(ValueError, match=r"`changed` to be a float tensor of shape .* of shape \(3, 8, 8\)"):
        measure(images, images[0])
    with pytest.raises(ValueError, match=r"`clean` to be a float tensor of shape .* of shape \(0, 3, 8, 8\)"):
        measure(images[:0], images[:0])
    with pytest.raises(ValueError, match=r"have the shape of `clean`, \(2, 3, 8, 8\), but got \(1, 3, 8, 8\)"):
        measure(images, images[:1])
