"""Gradient of an outer loss through the solution of an inner problem, without a Hessian."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ("ascent_step", "implicit_gradient", "project")


def project(perturbation: Tensor, radius: float) -> Tensor:
    r"""Return the nearest point of the L2 ball: :math:`\delta \min(1, C / \lVert \delta \rVert)`.

    Args:
        perturbation: Tensor of any shape, seen as one vector.
        radius: Radius :math:`C` of the ball, positive; ``math.inf`` bounds nothing.

    Example:
        >>> project(torch.tensor([3.0, 4.0]), radius=2.5)
        tensor([1.5000, 2.0000])
    """
    norm = torch.linalg.vector_norm(perturbation).clamp_min(torch.finfo(perturbation.dtype).tiny)
    # Inside the ball the factor must not depend on the perturbation, or rounding would enter the derivatives.
    return perturbation if bool(norm <= radius) else perturbation * (radius / norm)


def ascent_step(
    objective: Callable[[Tensor], Tensor],
    perturbation: Tensor,
    step_size: float,
    radius: float,
    *,
    create_graph: bool = False,
) -> Tensor:
    r"""Take one step of projected gradient ascent: :math:`\Pi_C(\delta + \alpha \nabla_\delta h(\delta))`.

    Args:
        objective: What to maximise: a perturbation to a tensor without dimensions.
        perturbation: Where to start; must require a gradient.
        step_size: Step :math:`\alpha`, positive.
        radius: Radius :math:`C` of the L2 ball, positive.
        create_graph: Whether the result is to be differentiated, by the perturbation and whatever the objective uses.

    Returns:
        The new perturbation, with a graph if ``create_graph``.

    Example:
        >>> start = torch.zeros(2, requires_grad=True)
        >>> ascent_step(lambda delta: 3 * delta[0] + 4 * delta[1], start, step_size=0.1, radius=10.0)
        tensor([0.3000, 0.4000])
    """
    (gradient,) = torch.autograd.grad(objective(perturbation), perturbation, create_graph=create_graph)
    start = perturbation if create_graph else perturbation.detach()
    return project(start + step_size * gradient, radius)


def implicit_gradient(
    outer_loss: Callable[[Tensor], Tensor],
    fixed_point_map: Callable[[Tensor], Tensor],
    perturbation: Tensor,
    parameters: Sequence[Tensor],
    iterations: int,
) -> list[Tensor]:
    r"""Gradient of :math:`F(\delta^*(\theta), \theta)` where :math:`\delta^* = \Phi(\delta^*, \theta)`.

    By the implicit function theorem it is
    :math:`\partial_\theta F + (\partial_\theta \Phi)^T (I - (\partial_\delta \Phi)^T)^{-1} \partial_\delta F`. The
    inverse is the limit of :math:`v_k = (\partial_\delta \Phi)^T v_{k-1} + \partial_\delta F`, :math:`v_0 = 0`, if
    :math:`\Phi` is a contraction (`Grazzi et al., 2020 <https://arxiv.org/abs/2006.16218>`_); the products with
    Jacobians come from double backward. Otherwise the iterations are a truncated series.

    Args:
        outer_loss: The outer loss :math:`F` of a perturbation, a tensor without dimensions.
        fixed_point_map: The map :math:`\Phi`, of a perturbation to one of its shape, with a graph to ``parameters``.
        perturbation: The inner solution :math:`\delta^*`, of any shape; its own graph is not used.
        parameters: The outer variables :math:`\theta`; all require a gradient.
        iterations: Number of iterations, at least 0; 0 leaves the direct part :math:`\partial_\theta F`.

    Returns:
        One gradient for each parameter; zeros for one that neither function uses.

    Example:
        The inner problem :math:`\max_\delta \; \theta \delta - \delta^2 / 2` has the solution :math:`\theta`:

        >>> theta = torch.tensor(3.0, requires_grad=True)
        >>> step = lambda delta: delta + 0.5 * (theta - delta)
        >>> implicit_gradient(lambda delta: delta**2, step, torch.tensor(3.0), [theta], iterations=50)
        [tensor(6.)]
    """
    with torch.enable_grad():
        point = perturbation.detach().requires_grad_()
        variables = [point, *parameters]
        direct = torch.autograd.grad(outer_loss(point), variables, allow_unused=True, materialize_grads=True)
        if iterations == 0:
            return list(direct[1:])
        mapped = fixed_point_map(point)
    sensitivity = direct[0]  # v_1
    for _ in range(iterations - 1):
        (product,) = torch.autograd.grad(mapped, point, sensitivity, retain_graph=True)
        sensitivity = product + direct[0]
    implicit = torch.autograd.grad(mapped, parameters, sensitivity, allow_unused=True, materialize_grads=True)
    return list(torch._foreach_add(list(direct[1:]), list(implicit)))
