"""Sums over samples of squared per-sample gradients of one layer, from its input and its output's gradient."""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

__all__ = ("LayerSquares", "in_parts", "layer_squares")

LayerSquares = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor], int], None]
"""Called with the layer, its input (B, ...), the gradient of its output (B, ...), the sums to add to by parameter name
and the bytes that the samples' gradients may take together."""

# With fewer output positions a matrix product of unfolded patches beats the convolution library on a CPU.
_MANY_POSITIONS = 64


def layer_squares(layer: nn.Module) -> LayerSquares | None:
    """Return the function that adds up the squares of a layer's per-sample gradients.

    It exists for ``Linear`` (between batch and features any dimensions), ``Conv2d`` padded with zeros, ``BatchNorm``
    in evaluation mode, ``GroupNorm`` and ``LayerNorm``. It does not for their subclasses, which may compute anything,
    nor for layers whose parameters were replaced, as weight normalisation does.

    Args:
        layer: Any module.

    Returns:
        The function, or None.

    Example:
        >>> import torch
        >>> layer, sums = nn.Linear(1, 1), {"bias": torch.zeros(1)}
        >>> add = layer_squares(layer)
        >>> add(layer, torch.ones(2, 1), torch.tensor([[1.0], [3.0]]), sums, 1024)
        >>> sums["bias"]
        tensor([10.])
        >>> layer_squares(nn.Bilinear(1, 1, 1)) is None
        True
    """
    if not set(layer._parameters) <= {"weight", "bias"}:
        return None
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return None
    return _RULES.get(type(layer))


def in_parts(first: Tensor, second: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two batches of equal length into parts of at most ``size`` samples.

    Args:
        first: A batch ``(B, ...)``.
        second: Another.
        size: At least 1.

    Example:
        >>> import torch
        >>> [(a.tolist(), b.tolist()) for a, b in in_parts(torch.arange(3), torch.arange(3, 6), 2)]
        [([0, 1], [3, 4]), ([2], [5])]
    """
    for start in range(0, len(first), size):
        yield first[start : start + size], second[start : start + size]


def _add_linear(layer: nn.Module, x: Tensor, gradient: Tensor, totals: dict[str, Tensor], memory: int) -> None:  # noqa: ARG001
    x, gradient = x.reshape(len(x), -1, x.shape[-1]), gradient.reshape(len(x), -1, gradient.shape[-1])
    if "bias" in totals:
        totals["bias"] += gradient.sum(1).square_().sum(0)
    if "weight" in totals:
        _add_squared_products(totals["weight"][None], gradient[:, None].transpose(2, 3), x[:, None], memory)


def _add_convolution(layer: nn.Module, x: Tensor, gradient: Tensor, totals: dict[str, Tensor], memory: int) -> None:
    assert isinstance(layer, nn.Conv2d)
    if "bias" in totals:
        totals["bias"] += gradient.sum((2, 3)).square_().sum(0)
    if "weight" not in totals:
        return
    if x.device.type == "cpu" and (layer.groups > 1 or gradient[0, 0].numel() >= _MANY_POSITIONS):
        _add_one_by_one(layer, x, gradient, totals["weight"])
    else:
        _add_unfolded(layer, x, gradient, totals["weight"], memory)


def _add_one_by_one(layer: nn.Conv2d, x: Tensor, gradient: Tensor, total: Tensor) -> None:
    for one, direction in in_parts(x, gradient, 1):
        weight: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            one, total.shape, direction, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        total.addcmul_(weight, weight)


def _add_unfolded(layer: nn.Conv2d, x: Tensor, gradient: Tensor, total: Tensor, memory: int) -> None:
    assert not isinstance(layer.padding, str)
    groups, positions, taps = layer.groups, gradient[0, 0].numel(), total[0].numel()
    unfolded_bytes = groups * taps * positions * total.element_size()
    for part, direction in in_parts(x, gradient, max(1, memory // unfolded_bytes)):
        patches = F.unfold(part, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        left = direction.reshape(len(part), groups, -1, positions)
        right = patches.view(len(part), groups, taps, positions).transpose(2, 3)
        _add_squared_products(total.view(groups, -1, taps), left, right, memory)


def _add_batch_norm(layer: nn.Module, x: Tensor, gradient: Tensor, totals: dict[str, Tensor], memory: int) -> None:
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, variance = layer.running_mean.to(x), layer.running_var.to(x)
    for part, direction in in_parts(x, gradient, max(1, memory // x[0].nbytes)):
        normalised = F.batch_norm(part, mean, variance, eps=layer.eps)
        _add_scale_and_shift(normalised.unsqueeze(-1).flatten(2), direction.unsqueeze(-1).flatten(2), totals, 2)


def _add_group_norm(layer: nn.Module, x: Tensor, gradient: Tensor, totals: dict[str, Tensor], memory: int) -> None:
    assert isinstance(layer, nn.GroupNorm)
    for part, direction in in_parts(x, gradient, max(1, memory // x[0].nbytes)):
        normalised = F.group_norm(part, layer.num_groups, eps=layer.eps)
        _add_scale_and_shift(normalised.unsqueeze(-1).flatten(2), direction.unsqueeze(-1).flatten(2), totals, 2)


def _add_layer_norm(layer: nn.Module, x: Tensor, gradient: Tensor, totals: dict[str, Tensor], memory: int) -> None:
    assert isinstance(layer, nn.LayerNorm)
    shape = (len(x), -1, *layer.normalized_shape)
    for part, direction in in_parts(x.reshape(shape), gradient.reshape(shape), max(1, memory // x[0].nbytes)):
        normalised = F.layer_norm(part, layer.normalized_shape, eps=layer.eps)
        _add_scale_and_shift(normalised, direction, totals, 1)


_RULES: dict[type[nn.Module], LayerSquares] = {
    nn.Linear: _add_linear,
    nn.Conv2d: _add_convolution,
    nn.BatchNorm1d: _add_batch_norm,
    nn.BatchNorm2d: _add_batch_norm,
    nn.BatchNorm3d: _add_batch_norm,
    nn.GroupNorm: _add_group_norm,
    nn.LayerNorm: _add_layer_norm,
}


def _add_squared_products(total: Tensor, left: Tensor, right: Tensor, memory: int) -> None:
    """Add the squares of the products of ``left`` (B, G, O, L) and ``right`` (B, G, L, K) to ``total`` (G, O, K)."""
    if left.shape[1] == left.shape[3] == 1:
        # Without a sum inside, the squared product is the product of the squares.
        total[0].addmm_(left.flatten(1).square().t(), right.flatten(1).square())
        return
    for left_part, right_part in in_parts(left, right, max(1, memory // total.nbytes)):
        products = left_part @ right_part
        if len(products) == 1:
            total.addcmul_(products[0], products[0])
        else:
            total += products.square_().sum(0)


def _add_scale_and_shift(normalised: Tensor, gradient: Tensor, totals: dict[str, Tensor], dim: int) -> None:
    """Add the squares for ``weight * normalised + bias``, summed over the positions in dimension ``dim``."""
    if "weight" in totals:
        totals["weight"] += (normalised * gradient).sum(dim).square_().sum(0)
    if "bias" in totals:
        totals["bias"] += gradient.sum(dim).square_().sum(0)
