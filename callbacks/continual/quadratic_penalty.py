"""Quadratic penalty on the distance from earlier weights, with its gradient in closed form."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ("QuadraticPenalty",)


class QuadraticPenalty:
    r"""The penalty :math:`\lambda \sum_i F_i (\theta_i - \theta^*_i)^2`, whose gradient is added to ``.grad``.

    Nothing is added to the autograd graph. The lists of tensors are made once, so that a step costs two fused
    operations over all parameters.

    Args:
        model: Its parameters are :math:`\theta`.
        importance: :math:`F` by parameter name, not negative. Parameters for which it is zero are left alone, and so
            are those that are not in it.
        anchor: :math:`\theta^*` by parameter name.
        strength: :math:`\lambda`, at least 0.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> penalty = QuadraticPenalty(model, {"weight": torch.ones(1, 1)}, {"weight": torch.ones(1, 1)}, strength=0.5)
        >>> penalty.value()
        tensor(2.)
        >>> penalty.add_gradient()
        >>> model.weight.grad
        tensor([[2.]])
    """

    def __init__(
        self, model: nn.Module, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor], strength: float
    ) -> None:
        parameters = dict(model.named_parameters())
        kept = [name for name, tensor in importance.items() if strength > 0 and tensor.any()]
        self._names = kept
        self._parameters: list[Tensor] = [parameters[name] for name in kept]
        self._anchors = [anchor[name].to(parameters[name]) for name in kept]
        # The product is formed in the precision of F, whose entries may be too small for that of the weights.
        # In the parameter's memory format, or foreach operations fall back to one kernel per tensor.
        self._curvatures = [
            torch.empty_like(parameters[name].detach()).copy_(2 * strength * importance[name]) for name in kept
        ]

    def largest_curvature(self) -> float:
        r"""Return the largest second derivative, :math:`2 \lambda \max_i F_i`; NaN or infinite if any is."""
        return float(torch.stack([c.max().double() for c in self._curvatures]).max()) if self._curvatures else 0.0

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0, loss_scale: Tensor | None = None) -> None:
        """Add the gradient of ``scale * loss_scale`` times the penalty to ``.grad``.

        Parameters that are frozen by now are left out; where there is no ``.grad``, it becomes the penalty's.

        Args:
            scale: Factor of the loss in this backward pass, such as one over the number of accumulated batches.
            loss_scale: The GradScaler's factor, a tensor without dimensions; None is 1.
        """
        parameters, anchors, curvatures = self._parameters, self._anchors, self._curvatures
        if any(p.grad is None for p in parameters):
            rows = [row for row in zip(parameters, anchors, curvatures, strict=True) if row[0].requires_grad]
            parameters, anchors, curvatures = ([row[column] for row in rows] for column in range(3))
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if not parameters:
            return
        distances = list(torch._foreach_sub(parameters, anchors))
        if loss_scale is not None:
            torch._foreach_mul_(distances, loss_scale)
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_addcmul_(gradients, distances, curvatures, value=scale)

    @torch.no_grad()
    def gradient(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Return the gradient of ``scale`` times the penalty at the present weights, by parameter name.

        Args:
            scale: Any factor.
        """
        if not self._parameters:
            return {}
        gradients = list(torch._foreach_sub(self._parameters, self._anchors))
        torch._foreach_mul_(gradients, self._curvatures)
        torch._foreach_mul_(gradients, scale)
        return dict(zip(self._names, gradients, strict=True))

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the penalty, a float32 or float64 tensor without dimensions; nothing waits for the device."""
        if not self._parameters:
            return torch.zeros(())
        distances = list(torch._foreach_sub(self._parameters, self._anchors))
        torch._foreach_mul_(distances, distances)
        torch._foreach_mul_(distances, self._curvatures)
        terms = [term.sum(dtype=torch.promote_types(term.dtype, torch.float32)) for term in distances]
        return torch.stack(terms).sum() / 2
