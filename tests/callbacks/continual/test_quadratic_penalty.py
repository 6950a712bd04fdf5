"""The penalty in closed form against autograd."""

import torch
from torch import Tensor, nn

from lightning_bd.callbacks.continual.quadratic_penalty import QuadraticPenalty


def make(strength: float = 0.7) -> tuple[nn.Module, QuadraticPenalty, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters() if name != "1.bias"}
    importance["0.bias"] = torch.zeros(4, dtype=torch.float64)
    anchor = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    terms = [(importance[n] * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters() if n in importance]
    return model, QuadraticPenalty(model, importance, anchor, strength), strength * torch.stack(terms).sum()


def test_value_and_gradient() -> None:
    model, penalty, expected = make()
    torch.testing.assert_close(penalty.value(), expected.detach())
    first, second = model[0].weight, model[1].weight  # type: ignore[index]
    gradients = torch.autograd.grad(expected, [first, second])
    first.grad = torch.ones_like(first)
    penalty.add_gradient(scale=0.5, loss_scale=torch.tensor(8.0))
    torch.testing.assert_close(first.grad, 1 + 4 * gradients[0])
    torch.testing.assert_close(second.grad, 4 * gradients[1])
    assert model[0].bias.grad is None  # type: ignore[index]
    assert model[1].bias.grad is None  # type: ignore[index]


def test_gradient_by_name() -> None:
    model, penalty, expected = make()
    gradients = penalty.gradient(scale=0.5)
    assert set(gradients) == {"0.weight", "1.weight"}
    for name, gradient in gradients.items():
        (by_autograd,) = torch.autograd.grad(expected, model.get_parameter(name), retain_graph=True)
        torch.testing.assert_close(gradient, 0.5 * by_autograd)
    assert all(p.grad is None for p in model.parameters())


def test_keeps_the_memory_of_the_gradient() -> None:
    """DDP's buckets are views of it."""
    model, penalty, _ = make()
    penalty.add_gradient()
    before = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    penalty.add_gradient()
    assert [p.grad.data_ptr() for p in model.parameters() if p.grad is not None] == before


def test_largest_curvature() -> None:
    model = nn.Linear(1, 1, bias=False)
    assert (
        QuadraticPenalty(
            model, {"weight": torch.tensor([[2.0]])}, {"weight": torch.zeros(1, 1)}, 3.0
        ).largest_curvature()
        == 12
    )


def test_zero_strength_does_nothing() -> None:
    model, penalty, _ = make(strength=0.0)
    penalty.add_gradient()
    assert all(p.grad is None for p in model.parameters())
    assert penalty.value() == penalty.largest_curvature() == 0
    assert penalty.gradient() == {}


def test_frozen_parameters_are_skipped() -> None:
    model, penalty, _ = make()
    model.requires_grad_(False)
    penalty.add_gradient()
    assert all(p.grad is None for p in model.parameters())
