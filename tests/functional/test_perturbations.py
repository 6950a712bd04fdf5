"""The formulas, each against one written with flat vectors, in float64 where rounding would hide a mistake."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_bd.functional.perturbations import (
    asam_perturbation,
    global_norm,
    gsam_gradient,
    looksam_direction,
    looksam_gradient,
    sam_perturbation,
)

SHAPES = ((4, 3), (4,), (2, 3, 3, 3), (2,), ())


def draw(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_same(tensors: Sequence[Tensor], vector: Tensor) -> None:
    assert [tensor.shape for tensor in tensors] == [torch.Size(shape) for shape in SHAPES]
    torch.testing.assert_close(flat(tensors), vector, rtol=1e-9, atol=1e-11)


def test_global_norm_is_that_of_one_long_vector() -> None:
    tensors = draw(0)
    torch.testing.assert_close(global_norm(tensors), (flat(tensors) ** 2).sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_global_norm_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    tensors = [torch.full((1000,), 300.0, dtype=dtype), torch.full((1,), 0.5, dtype=dtype)]
    norm = global_norm(tensors)
    assert norm.dtype is torch.float32
    # The squares sum to 9e7, which float16 cannot hold.
    torch.testing.assert_close(norm, torch.tensor((1000 * 300.0**2 + 0.25) ** 0.5))


def test_global_norm_of_mixed_dtypes() -> None:
    norm = global_norm([torch.tensor([3.0], dtype=torch.float16), torch.tensor([4.0], dtype=torch.float64)])
    assert norm.dtype is torch.float64
    assert norm == 5


def test_sam_perturbation() -> None:
    gradients = draw(0)
    vector = flat(gradients)
    assert_same(sam_perturbation(gradients, rho=0.3), 0.3 * vector / vector.norm())


def test_sam_perturbation_keeps_the_dtype() -> None:
    perturbation = sam_perturbation(draw(0, torch.bfloat16), rho=0.3)
    assert all(part.dtype is torch.bfloat16 for part in perturbation)
    torch.testing.assert_close(global_norm(perturbation), torch.tensor(0.3), rtol=1e-2, atol=0)


def test_sam_perturbation_of_a_zero_gradient_is_zero() -> None:
    assert all((part == 0).all() for part in sam_perturbation([torch.zeros(shape) for shape in SHAPES], rho=0.3))


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5])
def test_asam_perturbation(eta: float) -> None:
    gradients, parameters = draw(0), draw(1)
    before = flat(gradients).clone()
    operator = flat([p.abs() + eta if p.ndim > 1 else torch.ones_like(p) for p in parameters])
    vector = flat(gradients)
    expected = 0.7 * operator**2 * vector / (operator * vector).norm()
    assert_same(asam_perturbation(gradients, parameters, rho=0.7, eta=eta), expected)
    assert torch.equal(flat(gradients), before)


def test_asam_perturbation_of_biases_only_is_sam() -> None:
    gradients, parameters = [torch.tensor([3.0, 4.0])], [torch.tensor([5.0, 6.0])]
    torch.testing.assert_close(asam_perturbation(gradients, parameters, rho=1.0), [torch.tensor([0.6, 0.8])])


def test_asam_perturbation_follows_the_scale_of_the_weights() -> None:
    """A network rescaled by 10 in its only layer has a gradient 10 times smaller there and the same loss."""
    gradients, parameters = [torch.randn(3, 3, dtype=torch.float64)], [torch.randn(3, 3, dtype=torch.float64)]
    (small,) = asam_perturbation(gradients, parameters, rho=0.5, eta=0.0)
    (large,) = asam_perturbation([gradients[0] / 10], [parameters[0] * 10], rho=0.5, eta=0.0)
    torch.testing.assert_close(large, small * 10)


def test_gsam_gradient() -> None:
    gradients, sharp = draw(0), draw(1)
    g, s = flat(gradients), flat(sharp)
    orthogonal = g - (g @ s) / (s @ s) * s
    assert_same(gsam_gradient(gradients, sharp, alpha=0.4), s - 0.4 * orthogonal)


def test_gsam_gradient_without_alpha_is_sam() -> None:
    sharp = draw(1)
    assert torch.equal(flat(gsam_gradient(draw(0), sharp, alpha=0.0)), flat(sharp))


def test_gsam_gradient_of_a_zero_sharp_gradient_is_finite() -> None:
    gradients, sharp = [torch.tensor([1.0, 2.0])], [torch.zeros(2)]
    torch.testing.assert_close(gsam_gradient(gradients, sharp, alpha=0.5), [torch.tensor([-0.5, -1.0])])


def test_looksam_direction() -> None:
    gradients, sharp = draw(0), draw(1)
    g, s = flat(gradients), flat(sharp)
    cosine = (g @ s) / (g.norm() * s.norm())
    # The paper's form: v = g_s - |g_s| cos(theta) g / |g|.
    v = s - s.norm() * cosine * g / g.norm()
    direction = looksam_direction(gradients, sharp)
    assert_same(direction, v / v.norm())
    assert abs(flat(direction) @ g) < 1e-12


def test_looksam_direction_of_parallel_gradients_is_zero() -> None:
    gradients = [torch.tensor([3.0, 4.0])]
    torch.testing.assert_close(looksam_direction(gradients, gradients), [torch.zeros(2)])


def test_looksam_gradient() -> None:
    gradients, direction = draw(0), draw(1)
    g = flat(gradients)
    assert_same(looksam_gradient(gradients, direction, alpha=0.7), g + 0.7 * g.norm() * flat(direction))
