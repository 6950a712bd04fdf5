"""Projected gradient ascent against the equations."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.functional.projected_gradient import projected_gradient_ascent


def images() -> Tensor:
    return torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def test_equals_the_equations_image_by_image() -> None:
    weights = torch.randn(18, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1])

    def loss(batch: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(batch.flatten(1).double() @ weights, wanted, reduction="sum")

    start = images().double()
    found = projected_gradient_ascent(lambda batch: loss(batch, labels), start, 0.1, 0.03, steps=7)
    for i in range(5):
        x = start[i].flatten()
        for _ in range(7):
            logits = x @ weights
            # d/dx of -log softmax_y: W (softmax - onehot).
            gradient = weights @ (logits.softmax(0) - nn.functional.one_hot(labels[i], 4))
            x = (x + 0.03 * gradient.sign()).clamp(start[i].flatten() - 0.1, start[i].flatten() + 0.1).clamp(0, 1)
        assert torch.allclose(found[i].flatten(), x, atol=1e-12)
    assert (found - start).abs().max() <= 0.1 + 1e-12
    assert ((found - start).abs() > 0.099).any()


def test_stays_in_the_ball_and_in_the_image_range() -> None:
    start = images()
    found = projected_gradient_ascent(lambda batch: batch.sum(), start, 0.25, 0.2, steps=3)
    assert torch.equal(found, (start + 0.25).clamp(max=1))


@pytest.mark.parametrize(("epsilon", "steps"), [(0.0, 3), (0.1, 0)])
def test_nothing_to_do(epsilon: float, steps: int) -> None:
    start = images()
    found = projected_gradient_ascent(lambda batch: batch.sum(), start, epsilon, 0.1, steps)
    assert torch.equal(found, start)
    assert found is not start


def test_works_without_gradients_and_leaves_no_graph() -> None:
    with torch.inference_mode():
        found = projected_gradient_ascent(lambda batch: batch.square().sum(), images(), 0.1, 0.1, steps=2)
    assert not found.requires_grad
    assert not found.is_inference()
