"""The projection of A-GEM against the formula, the quadratic program that it solves, and edge cases."""

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lightning_bd.functional.gradient_projection import agem_projection


def make_vectors(seed: int, conflict: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, 2), (4,), ())]
    reference = torch.randn(11, generator=generator)
    product = torch.cat([g.flatten() for g in gradients]) @ reference
    return gradients, reference if (product < 0) == conflict else -reference


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("seed", range(3))
def test_projection_equals_the_formula(seed: int) -> None:
    gradients, reference = make_vectors(seed, conflict=True)
    result, projected = agem_projection(gradients, reference)
    g, r = flat(gradients).double(), reference.double()
    torch.testing.assert_close(flat(result).double(), g - (g @ r) / (r @ r) * r, atol=1e-6, rtol=1e-5)
    assert projected
    assert [part.shape for part in result] == [part.shape for part in gradients]
    assert abs(float(flat(result) @ reference)) < 1e-5


def test_projection_is_the_nearest_vector_that_does_not_conflict() -> None:
    gradients, reference = make_vectors(0, conflict=True)
    g, r = flat(gradients).double().numpy(), reference.double().numpy()
    nearest = minimize(
        lambda v: ((v - g) ** 2).sum(), g * 0, jac=lambda v: 2 * (v - g), method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: v @ r, "jac": lambda v: r}, options={"ftol": 1e-12},
    )  # fmt: skip
    result, _ = agem_projection(gradients, reference)
    torch.testing.assert_close(flat(result).double(), torch.from_numpy(nearest.x), atol=1e-5, rtol=0)


def test_gradient_without_conflict_is_kept_bit_for_bit() -> None:
    gradients, reference = make_vectors(0, conflict=False)
    result, projected = agem_projection(gradients, reference)
    assert not projected
    assert torch.equal(flat(result), flat(gradients))


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_of_the_reference_has_no_effect(factor: float) -> None:
    """Squares of the smallest and the largest of them leave the range of float32."""
    gradients, reference = make_vectors(1, conflict=True)
    expected, _ = agem_projection(gradients, reference)
    result, projected = agem_projection(gradients, reference * factor)
    assert projected
    torch.testing.assert_close(flat(result), flat(expected))


def test_scale_of_the_gradient_is_kept() -> None:
    gradients, reference = make_vectors(1, conflict=True)
    expected, _ = agem_projection(gradients, reference)
    result, _ = agem_projection([g * 1024 for g in gradients], reference)
    torch.testing.assert_close(flat(result), flat(expected) * 1024)


def test_zero_reference_projects_nothing() -> None:
    gradients, _ = make_vectors(0, conflict=True)
    result, projected = agem_projection(gradients, torch.zeros(11))
    assert not projected
    assert torch.equal(flat(result), flat(gradients))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_reference_that_is_not_finite_projects_nothing(value: float) -> None:
    gradients, reference = make_vectors(0, conflict=True)
    for position in range(11):
        broken = reference.clone()
        broken[position] = value
        result, projected = agem_projection(gradients, broken)
        assert not projected
        assert torch.equal(flat(result), flat(gradients))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_gradient_that_is_not_finite_is_kept(value: float) -> None:
    gradients, reference = make_vectors(0, conflict=True)
    gradients[1][2] = value
    result, projected = agem_projection(gradients, reference)
    assert not projected
    torch.testing.assert_close(flat(result), flat(gradients), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept_and_sums_are_not_half(dtype: torch.dtype) -> None:
    """A sum in float16 would overflow: 4096 times 64 is 262144."""
    gradient, reference = torch.full((4096,), 64.0, dtype=dtype), torch.full((4096,), -8.0, dtype=dtype)
    gradient[0] = -64.0
    [result], projected = agem_projection([gradient], reference)
    assert projected
    assert result.dtype == dtype
    g, r = gradient.double(), reference.double()
    expected = g - (g @ r) / (r @ r) * r
    torch.testing.assert_close(result.double(), expected, atol=64 * torch.finfo(dtype).eps, rtol=0)


def test_gradients_of_several_dtypes() -> None:
    gradients = [torch.tensor([1.0, 1.0], dtype=torch.bfloat16), torch.tensor([[1.0]])]
    result, _ = agem_projection(gradients, torch.tensor([-1.0, 0.0, 0.0]))
    assert [part.dtype for part in result] == [torch.bfloat16, torch.float32]
    assert flat([part.float() for part in result]).tolist() == [0.0, 1.0, 1.0]


def test_inputs_are_not_changed_and_memory_formats_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(2, 3, 4, 4, generator=generator)
    reference = -gradient.flatten() + torch.randn(96, generator=generator)
    before = gradient.clone(), reference.clone()
    [expected], projected = agem_projection([gradient], reference)
    assert projected
    assert torch.equal(gradient, before[0])
    assert torch.equal(reference, before[1])
    [result], _ = agem_projection([gradient.to(memory_format=torch.channels_last)], reference)
    torch.testing.assert_close(result, expected)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`reference` to have shape \(3,\), .* but got \(2,\)"):
        agem_projection([torch.ones(2), torch.ones(())], torch.ones(2))
