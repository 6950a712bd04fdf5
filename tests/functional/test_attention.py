"""Attention maps against loops over single numbers."""

import math
import re

import pytest
import torch
from torch import Tensor

from lightning_bd.functional.attention import attention_loss, attention_map


def by_hand(features: Tensor, p: float) -> list[list[float]]:
    """One image, one position and one channel at a time; positions in reading order."""
    maps = []
    for image in features.tolist():
        if features.ndim == 4:
            height, width = features.shape[2:]
            vectors = [[channel[y][x] for channel in image] for y in range(height) for x in range(width)]
        else:
            vectors = image
        sums = [sum(abs(value) ** p for value in vector) for vector in vectors]
        norm = math.sqrt(sum(value * value for value in sums))
        maps.append([value / norm for value in sums])
    return maps


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 2, 2), (2, 7, 4)])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_map_equals_loops(shape: tuple[int, ...], p: float) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attention_map(features, p), torch.tensor(by_hand(features, p)), atol=1e-6)


def test_the_power_is_two_by_default() -> None:
    features = torch.randn(2, 3, 4, 5)
    assert torch.equal(attention_map(features), attention_map(features, 2.0))
    assert not torch.allclose(attention_map(features), attention_map(features, 1.0))


def test_neither_scale_nor_sign_matters() -> None:
    features = torch.randn(2, 3, 4, 5)
    assert torch.allclose(attention_map(-3 * features), attention_map(features), atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    features = 300 * torch.rand(1, 2, 2, 2, dtype=torch.float16)
    found = attention_map(features)
    assert found.dtype is torch.float32
    assert torch.allclose(found, attention_map(features.float()))
    assert attention_map(features.double()).dtype is torch.float64


def test_an_image_without_activation_has_no_attention_and_a_finite_gradient() -> None:
    features = torch.zeros(1, 2, 2, 2, requires_grad=True)
    found = attention_map(features)
    assert torch.equal(found, torch.zeros(1, 4))
    (gradient,) = torch.autograd.grad(((found - 1) ** 2).sum(), features)
    assert torch.isfinite(gradient).all()


def test_loss_equals_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 3, 4, 5), (2, 6, 2, 2), (2, 7, 4)]
    student = [torch.randn(shape, generator=generator) for shape in shapes]
    teacher = [torch.randn(shape, generator=generator) for shape in shapes]
    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        pairs = [
            (a, b)
            for rows in zip(by_hand(ours, 2), by_hand(theirs, 2), strict=True)
            for a, b in zip(*rows, strict=True)
        ]
        expected += sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    assert attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert attention_loss(student, student).item() == 0


def test_loss_has_the_numerical_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(2, 2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 2, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda features: attention_loss([features], [teacher]), (student,))


def test_refuses() -> None:
    maps = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=re.escape("(B, C, H, W) or (B, N, D), but got (2, 3).")):
        attention_map(torch.ones(2, 3))
    for p in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"`p` to be a finite number of at least 1, but got {p}"):
            attention_map(maps, p)
    with pytest.raises(ValueError, match="at least one, but got 0 and 0"):
        attention_loss([], [])
    with pytest.raises(ValueError, match="at least one, but got 1 and 2"):
        attention_loss([maps], [maps, maps])
    with pytest.raises(ValueError, match=re.escape("of shapes (1, 2, 3, 4) and (1, 2, 4, 4).")):
        attention_loss([maps], [torch.ones(1, 2, 4, 4)])
