"""The implicit gradient against closed forms, finite differences and explicit Jacobians, all in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from lightning_bd.functional.implicit_gradient import ascent_step, implicit_gradient, project


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class Quadratic:
    """Inner: max of (B theta) d - d A d / 2, so d* = A^-1 B theta. Outer: |d - c|^2 / 2 + |theta - e|^2 / 2."""

    def __init__(self) -> None:
        root = draw(4, 4)
        self.a = root @ root.T + 2 * torch.eye(4, dtype=torch.float64)
        self.b, self.c, self.e = draw(4, 3, seed=1), draw(4, seed=2), draw(3, seed=3)
        self.theta = draw(3, seed=4).requires_grad_()
        self.alpha = 1 / torch.linalg.eigvalsh(self.a).max().item()

    def solution(self, theta: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.a, self.b @ theta)
        return solved

    def outer(self, delta: Tensor, theta: Tensor) -> Tensor:
        return ((delta - self.c).square().sum() + (theta - self.e).square().sum()) / 2

    def gradient(self, iterations: int) -> Tensor:
        def step(delta: Tensor) -> Tensor:
            return ascent_step(
                lambda d: (self.b @ self.theta) @ d - d @ self.a @ d / 2, delta, self.alpha, math.inf, create_graph=True
            )

        delta = self.solution(self.theta).detach()
        (gradient,) = implicit_gradient(lambda d: self.outer(d, self.theta), step, delta, [self.theta], iterations)
        return gradient


def test_a_strongly_concave_inner_problem_has_its_closed_form() -> None:
    problem = Quadratic()
    theta = problem.theta.detach()
    direct = theta - problem.e
    closed = direct + problem.b.T @ torch.linalg.solve(problem.a, problem.solution(theta) - problem.c)
    assert (closed - direct).norm() > 0.1 * direct.norm()
    torch.testing.assert_close(problem.gradient(iterations=300), closed, rtol=1e-9, atol=1e-9)


def test_finite_differences_of_the_solved_problem() -> None:
    problem = Quadratic()
    theta, step = problem.theta.detach(), 1e-5
    slopes = [
        (problem.outer(problem.solution(theta + e), theta + e) - problem.outer(problem.solution(theta - e), theta - e))
        / (2 * step)
        for e in step * torch.eye(3, dtype=torch.float64)
    ]
    torch.testing.assert_close(problem.gradient(iterations=300), torch.stack(slopes), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_few_iterations_are_the_truncated_series(iterations: int) -> None:
    problem = Quadratic()
    theta = problem.theta.detach()
    contraction = torch.eye(4, dtype=torch.float64) - problem.alpha * problem.a
    outer = problem.solution(theta) - problem.c
    series = torch.zeros(4, dtype=torch.float64)
    for power in range(iterations):
        series += torch.linalg.matrix_power(contraction, power) @ outer
    expected = theta - problem.e + problem.alpha * problem.b.T @ series
    torch.testing.assert_close(problem.gradient(iterations), expected)


def test_a_solution_on_the_bound_has_its_closed_form() -> None:
    """The maximum of b d in the ball is C b / |b|: only the part across b answers a change of b."""
    b, c, radius = draw(4, seed=1).requires_grad_(), draw(4, seed=2), 1.5
    unit = (b / b.norm()).detach()

    def step(delta: Tensor) -> Tensor:
        return ascent_step(lambda d: b @ d, delta, 0.7, radius, create_graph=True)

    (gradient,) = implicit_gradient(lambda d: (d - c).square().sum() / 2, step, radius * unit, [b], iterations=200)
    slope = radius * unit - c
    across = slope - (slope @ unit) * unit
    torch.testing.assert_close(gradient, radius / b.detach().norm() * across)


@pytest.mark.parametrize("radius", [0.5, 50.0])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_a_small_network_equals_explicit_jacobians(radius: float, iterations: int) -> None:
    """With parameters of two shapes, one of which only the outer loss uses and one that none does."""
    images, labels = draw(5, 4, seed=1), torch.tensor([0, 1, 2, 0, 1])
    shapes = [(6, 4), (3, 6), (3,), (2,)]
    parameters = [draw(*shape, seed=10 + i).requires_grad_() for i, shape in enumerate(shapes)]
    delta = 0.4 * draw(4, seed=5)

    def loss(delta: Tensor, first: Tensor, second: Tensor, bias: Tensor | float) -> Tensor:
        logits = torch.tanh((images + delta) @ first.T) @ second.T + bias
        return torch.nn.functional.cross_entropy(logits, labels)

    def outer(delta: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
        return loss(0.5 * delta, first, second, bias)

    def mapped(delta: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The projected step by its formula."""
        point = delta if delta.requires_grad else delta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point, first, second, 0.0), point, create_graph=True)
        moved = point + 2.0 * gradient
        return moved * torch.clamp(radius / moved.norm(), max=1.0)

    def step(delta: Tensor) -> Tensor:
        return ascent_step(lambda d: loss(d, parameters[0], parameters[1], 0.0), delta, 2.0, radius, create_graph=True)

    found = implicit_gradient(lambda d: outer(d, *parameters[:3]), step, delta, parameters, iterations)

    inputs = (delta.requires_grad_(), *parameters[:2])
    assert (mapped(*inputs).norm() < radius - 1e-6) == (radius > 1)
    by_delta, by_first, by_second = jacobian(mapped, inputs)  # type: ignore[no-untyped-call]
    outer_delta, *outer_parameters = torch.autograd.grad(outer(delta, *parameters[:3]), [delta, *parameters[:3]])
    v = torch.zeros(4, dtype=torch.float64)
    for _ in range(iterations):
        v = by_delta.T @ v + outer_delta
    expected = [
        outer_parameters[0] + torch.einsum("i,ijk->jk", v, by_first),
        outer_parameters[1] + torch.einsum("i,ijk->jk", v, by_second),
        outer_parameters[2],
        torch.zeros(2, dtype=torch.float64),
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_arguments_are_as_before() -> None:
    theta, delta = draw(3).requires_grad_(), draw(3, seed=1)
    before = delta.clone()
    with torch.no_grad():
        (gradient,) = implicit_gradient(lambda d: d @ theta, lambda d: d * theta, delta, [theta], 2)
    assert not gradient.requires_grad
    assert not delta.requires_grad
    assert delta.grad is None
    assert theta.grad is None
    assert torch.equal(delta, before)


def test_project() -> None:
    point = draw(2, 3)
    norm = point.norm().item()
    assert project(point, norm + 1e-9) is point
    assert project(point, math.inf) is point
    half = project(point, norm / 2)
    torch.testing.assert_close(half, point / 2)
    assert torch.equal(project(torch.zeros(3), 1.0), torch.zeros(3))


def test_projection_does_not_change_derivatives_inside_the_ball() -> None:
    point = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    slope = jacobian(lambda x: project(2 * x, 1.0), point)  # type: ignore[no-untyped-call]
    assert torch.equal(slope, 2 * torch.eye(3, dtype=torch.float64))


def test_ascent_step() -> None:
    start = draw(3).requires_grad_()
    plain = ascent_step(lambda d: d.pow(3).sum(), start, 0.1, math.inf)
    torch.testing.assert_close(plain, start.detach() + 0.3 * start.detach() ** 2)
    assert not plain.requires_grad
    assert start.grad is None
    graph = ascent_step(lambda d: d.pow(3).sum(), start, 0.1, math.inf, create_graph=True)
    (slope,) = torch.autograd.grad(graph.sum(), start)
    torch.testing.assert_close(slope, 1 + 0.6 * start.detach())
    assert ascent_step(lambda d: d.pow(3).sum(), start, 0.1, 0.25).norm().item() == pytest.approx(0.25)
