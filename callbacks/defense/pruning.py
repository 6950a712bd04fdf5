"""Silencing neurons by writing their weights, so that a pruned model needs no masks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.callbacks.defense.base import NotApplicableError

__all__ = ("silence",)


@torch.no_grad()
def silence(module: nn.Module, channels: Iterable[int] | Tensor, keep_bias: bool = False) -> None:
    """Make output channels of a layer constantly zero, permanently: in its weights.

    A channel of a batch normalisation gets weight and bias zero, one of a convolution or linear layer (a row) a zero
    filter and a zero bias. The channels stay in place, so that shapes and the names in a checkpoint do not change.

    Args:
        module: A convolution, a linear layer or a batch normalisation with affine parameters.
        channels: Indices of the channels, as integers or as a tensor ``(K,)`` int64; none is allowed.
        keep_bias: Leave the bias, so that the channels are constantly equal to it.

    Raises:
        NotApplicableError: If the layer has no weights that could silence a channel.
        IndexError: If there is no such channel.

    Example:
        >>> layer = nn.Conv2d(1, 2, 3)
        >>> silence(layer, [1])
        >>> layer(torch.rand(1, 1, 4, 4))[0, 1].abs().max().item()
        0.0
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, _BatchNorm)) or module.weight is None:
        raise NotApplicableError(
            f"Channels of {type(module).__name__} cannot be silenced through its weights: a convolution, a linear "
            "layer or a batch normalisation with affine parameters is needed."
        )
    index = torch.as_tensor(channels if isinstance(channels, Tensor) else list(channels), dtype=torch.int64)
    for parameter in (module.weight, None if keep_bias else module.bias):
        if parameter is not None:
            parameter[index.to(parameter.device)] = 0
