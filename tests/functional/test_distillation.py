"""Distances of outputs against NumPy's arithmetic and autograd."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.functional.distillation import softened_divergence, squared_probability_distance


def make_logits(size: int = 5, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = 3 * torch.randn(2, size, classes, generator=generator, dtype=torch.float64)
    return first, second


def softmax(logits: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    exponentials = np.exp(logits.numpy())
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
def test_divergence_is_the_formula(temperature: float) -> None:
    student, teacher = make_logits()
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(softened_divergence(student, teacher, temperature).numpy(), expected, rtol=1e-10)


def test_gradient_is_that_of_the_cross_entropy() -> None:
    """The paper's form: the cross-entropy of the softened probabilities, here times the squared temperature."""
    student, teacher = make_logits()
    student.requires_grad_()
    (ours,) = torch.autograd.grad(softened_divergence(student, teacher, 2.0).sum(), student)
    cross_entropy = F.cross_entropy(student / 2, (teacher / 2).softmax(1), reduction="sum")
    (papers,) = torch.autograd.grad(cross_entropy, student)
    torch.testing.assert_close(ours, 4 * papers)


def test_hot_divergence_is_a_distance_of_centred_logits() -> None:
    """Hinton et al., section 2.1: for a high temperature the gradient matches logits of zero mean."""
    student, teacher = make_logits()
    centred = [logits - logits.mean(1, keepdim=True) for logits in (student, teacher)]
    expected = (centred[0] - centred[1]).square().sum(1) / (2 * student.shape[1])
    torch.testing.assert_close(softened_divergence(student, teacher, 1e4), expected, rtol=1e-2, atol=0)


def test_distance_is_the_formula() -> None:
    student, teacher = make_logits()
    expected = ((softmax(student) - softmax(teacher)) ** 2).sum(1)
    np.testing.assert_allclose(squared_probability_distance(student, teacher).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("function", [softened_divergence, squared_probability_distance])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(function: type, dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in make_logits())
    values = function(student, teacher)
    assert values.dtype == torch.float32
    assert torch.equal(values, function(student.float(), teacher.float()))


@pytest.mark.parametrize("function", [softened_divergence, squared_probability_distance])
def test_zero_where_the_logits_differ_by_a_constant(function: type) -> None:
    student, _ = make_logits()
    torch.testing.assert_close(function(student, student + 7), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("function", [softened_divergence, squared_probability_distance])
@pytest.mark.parametrize("shape", [(5, 1), (1, 4), (4,), (5, 4, 1)])
def test_shapes_that_would_broadcast_are_refused(function: type, shape: tuple[int, ...]) -> None:
    student, _ = make_logits()
    with pytest.raises(ValueError, match=r"to be of one shape \(B, K\), but got \(5, 4\) and "):
        function(student, torch.zeros(shape))


def test_same_shapes_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape \(B, K\), but got \(4,\) and \(4,\)"):
        squared_probability_distance(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.inf, math.nan])
def test_temperature_is_checked(temperature: float) -> None:
    student, teacher = make_logits()
    with pytest.raises(ValueError, match=f"`temperature` to be a positive float, but got {temperature}"):
        softened_divergence(student, teacher, temperature)
