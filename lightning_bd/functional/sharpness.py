"""How sharp the minimum is in which a network lies: its top Hessian eigenvalue, and its loss in a ball."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.modes import mode
from lightning_bd.functional.perturbations import global_norm

__all__ = ("BallLoss", "Loss", "TopEigenvalue", "max_loss_in_ball", "top_hessian_eigenvalue")

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits ``(B, K)`` and labels ``(B,)`` to the mean over the batch."""

_ETA = 0.01  # of ASAM: moves weights that are zero


class TopEigenvalue(NamedTuple):
    r"""The Hessian's eigenvalue of largest magnitude, with its sign, and how well it is known.

    ``residual`` is :math:`\lVert H v - \lambda v \rVert / |\lambda|`: an eigenvalue lies that close, relatively.
    """

    value: float
    converged: bool
    residual: float
    iterations: int


class BallLoss(NamedTuple):
    """The loss at the weights, the largest one found in a ball around them, and their difference, at least 0."""

    loss: float
    worst_loss: float
    sharpness: float


def top_hessian_eigenvalue(
    model: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    iterations: int = 50,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
    loss: Loss = F.cross_entropy,
) -> TopEigenvalue:
    r"""Find the eigenvalue of largest magnitude of the loss's Hessian by power iteration.

    :math:`v \leftarrow H v / \lVert H v \rVert` from a random start; :math:`H v` is the derivative of
    :math:`\nabla L \cdot v`, a second backward pass, so that the Hessian is never built. The value is the Rayleigh
    quotient :math:`v \cdot H v`, with its sign: a negative one tells that the loss curves down more than up, and that
    the weights are not at a minimum. The iteration stops when :math:`\lVert H v - \lambda v \rVert \le
    \text{tolerance} \cdot |\lambda|`; an eigenvalue is then that close to :math:`\lambda`, and usually much closer, for
    the error is of second order in the residual. The larger the gap to the next eigenvalue the fewer iterations it
    takes; it never ends when the largest and the smallest are opposite.

    The network is differentiated in evaluation mode, with respect to the parameters that require a gradient. Weights,
    ``.grad`` and modes are left as they were.

    Args:
        model: Maps images ``(B, ...)`` to logits ``(B, K)``, and can be differentiated twice. Compiled parts run as
            written.
        batches: Batches on the model's device; ``batch[0]`` are the images, ``batch[1]`` the labels ``(B,)``.
        iterations: Hessian-vector products at most, positive; each takes about three times as long as a gradient.
        tolerance: Relative residual to stop at, positive.
        generator: CPU generator of the start; None starts at the same vector each time.
        loss: Mean over a batch; batches of different sizes are weighted by them.

    Returns:
        The eigenvalue, whether its residual is within the tolerance, the residual, and the iterations done. A Hessian
        of zeros has eigenvalue 0, residual 0.

    Raises:
        ValueError: If an argument is out of range, there is no image or no parameter that requires a gradient, or a
            derivative is not finite.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> value, converged, *_ = top_hessian_eigenvalue(model, data, loss=F.mse_loss)  # Hessian diag(4, 1)
        >>> round(value, 2), converged
        (4.0, True)
    """
    if iterations < 1:
        raise ValueError(f"Expected argument `iterations` to be a positive integer, but got {iterations}.")
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ValueError(f"Expected argument `tolerance` to be a positive float, but got {tolerance}.")
    parameters = _trainable(model)
    count = _count(batches)
    generator = generator or keyed_generator("power iteration")
    vector = _unit([torch.randn(p.shape, generator=generator).to(p) for p in parameters])
    value = residual = 0.0
    done = 0
    with _differentiable(model):
        while done < iterations:
            product = _hessian_vector_product(model, parameters, batches, count, vector, loss)
            done += 1
            value = float(torch.stack([(a * b).sum() for a, b in zip(product, vector, strict=True)]).sum())
            length = float(global_norm(product))
            if not math.isfinite(length):
                raise ValueError("The second derivative of the loss is not finite; check that its images are finite.")
            rest = torch._foreach_sub(product, torch._foreach_mul(vector, value))
            residual = float(global_norm(rest)) / abs(value) if value else 0.0 if length == 0 else math.inf
            if residual <= tolerance:
                break
            vector = _unit(product)
    return TopEigenvalue(value, residual <= tolerance, residual, done)


def max_loss_in_ball(
    model: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    rho: float = 0.05,
    steps: int = 1,
    adaptive: bool = False,
    loss: Loss = F.cross_entropy,
) -> BallLoss:
    r"""Search the largest loss at weights that are at most ``rho`` away.

    Projected ascent: :math:`\epsilon \leftarrow \Pi(\epsilon + \rho \, g / \lVert g \rVert)` with the gradient
    :math:`g` at :math:`w + \epsilon`, where :math:`\Pi` projects on the ball :math:`\lVert \epsilon \rVert \le \rho`.
    One step is the one of sharpness-aware minimization (`Foret et al., 2021 <https://arxiv.org/abs/2010.01412>`_);
    more find larger losses where the loss is curved. The largest loss seen is reported, that of the weights included:
    a lower bound of the maximum. With a gradient of exactly zero the search stays where it is.

    The network is differentiated in evaluation mode, over all batches together, with respect to the parameters that
    require a gradient. Weights (bit for bit), ``.grad`` and modes are put back, after an exception too.

    Args:
        model: Maps images ``(B, ...)`` to logits ``(B, K)``.
        batches: Batches on the model's device; ``batch[0]`` are the images, ``batch[1]`` the labels ``(B,)``.
        rho: Radius of the ball, positive; 0.05 in the paper for CIFAR.
        steps: Steps of the ascent, positive; each takes one gradient.
        adaptive: Whether the ball is :math:`\lVert T^{-1} \epsilon \rVert \le \rho` with :math:`T = |w| + 0.01` for
            weights (two or more dimensions), else 1, which does not depend on the scale of layers (`Kwon et al., 2021
            <https://arxiv.org/abs/2102.11600>`_); ``rho`` is then 0.5 to 2.
        loss: Mean over a batch; batches of different sizes are weighted by them.

    Returns:
        The loss at the weights, the largest one found, and their difference, at least 0. Where a loss
        in the ball is not finite the search ends, and the latter two are infinite. Where only its gradient is not
        finite the search ends too, with the largest loss seen.

    Raises:
        ValueError: If an argument is out of range, there is no image or no parameter that requires a gradient, or the
            loss at the weights is not finite.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 2.0)
        >>> result = max_loss_in_ball(model, [(torch.ones(1, 1), torch.zeros(1, 1))], rho=0.5, loss=F.mse_loss)
        >>> result.loss, result.worst_loss, result.sharpness
        (4.0, 6.25, 2.25)
    """
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"Expected argument `rho` to be a positive float, but got {rho}.")
    if steps < 1:
        raise ValueError(f"Expected argument `steps` to be a positive integer, but got {steps}.")
    parameters = _trainable(model)
    count = _count(batches)
    origin = [p.detach().clone() for p in parameters]
    scales = [w.abs() + _ETA if adaptive and w.ndim > 1 else torch.ones_like(w) for w in origin]
    # The perturbation divided by the scales: in these coordinates the ball is round.
    position = [torch.zeros_like(w) for w in origin]
    losses = []
    with _differentiable(model):
        try:
            for _ in range(steps):
                value, gradient = _gradient(model, parameters, batches, count, loss)
                losses.append(value)
                length = float(global_norm(gradient))
                if not (math.isfinite(value) and math.isfinite(length)):
                    break
                step = torch._foreach_mul(_unit(_product(gradient, scales)), rho)
                position = _projected(_sum(position, step), rho)
                _assign(parameters, _sum(origin, _product(position, scales)))
            else:
                with torch.no_grad():
                    losses.append(sum(float(part) for part in _losses(model, batches, count, loss)))
        finally:
            _assign(parameters, origin)
    if len(losses) == 1 or not math.isfinite(losses[0]):
        raise ValueError(
            f"The loss at the weights is {losses[0]:g}, and it or its gradient is not finite; check that images and"
            " weights are finite."
        )
    worst = max(value if math.isfinite(value) else math.inf for value in losses)
    return BallLoss(losses[0], worst, worst - losses[0])


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("Expected argument `model` to have a parameter that requires a gradient, but it has none.")
    return parameters


def _count(batches: Sequence[Sequence[Tensor]]) -> int:
    count = sum(len(batch[0]) for batch in batches)
    if count == 0:
        raise ValueError("Expected argument `batches` to hold at least one image, but got none.")
    return count


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    # Compiled modules and the fused kernels of attention have no second derivative.
    plain, unfused = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
    with mode(model, training=False), torch.inference_mode(False), torch.enable_grad(), plain, unfused:
        yield


def _losses(model: nn.Module, batches: Iterable[Sequence[Tensor]], count: int, loss: Loss) -> Iterator[Tensor]:
    """The batches' parts of the mean over all images, one graph at a time."""
    for batch in batches:
        yield loss(model(batch[0]), batch[1]) * (len(batch[0]) / count)


def _gradient(
    model: nn.Module, parameters: list[nn.Parameter], batches: Sequence[Sequence[Tensor]], count: int, loss: Loss
) -> tuple[float, list[Tensor]]:
    value, total = 0.0, [torch.zeros_like(p) for p in parameters]
    for part in _losses(model, batches, count, loss):
        value += float(part.detach())
        torch._foreach_add_(total, torch.autograd.grad(part, parameters, materialize_grads=True))
    return value, total


def _hessian_vector_product(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batches: Sequence[Sequence[Tensor]],
    count: int,
    vector: list[Tensor],
    loss: Loss,
) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in parameters]
    for part in _losses(model, batches, count, loss):
        gradient = torch.autograd.grad(part, parameters, create_graph=True, materialize_grads=True)
        slope = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
        if slope.requires_grad:  # else the loss is linear in the weights
            torch._foreach_add_(total, torch.autograd.grad(slope, parameters, materialize_grads=True))
    return total


def _unit(vector: Sequence[Tensor]) -> list[Tensor]:
    length = float(global_norm(vector))
    return list(torch._foreach_div(list(vector), length)) if length else list(vector)


def _projected(vector: list[Tensor], radius: float) -> list[Tensor]:
    length = float(global_norm(vector))
    return vector if length <= radius else list(torch._foreach_mul(vector, radius / length))


def _sum(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._foreach_add(list(first), list(second)))


def _product(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._foreach_mul(list(first), list(second)))


@torch.no_grad()
def _assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
