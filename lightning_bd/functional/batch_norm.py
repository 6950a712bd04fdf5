"""Batch normalisation helpers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ("frozen_running_stats",)


@contextmanager
def frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of ``module`` unchanged inside the block.

    A layer in training mode still normalises with the statistics of the batch, one in evaluation mode with the running
    ones. Neither ``running_mean`` and ``running_var`` nor ``num_batches_tracked`` change, whatever ``momentum`` is; it
    is as if ``momentum`` were 0. The layers' flags are put back when the block ends, also after an exception. Blocks on
    the same module may be nested.

    Args:
        module: Any module; layers other than ``BatchNorm`` and ``SyncBatchNorm`` are left alone.

    Example:
        >>> import torch
        >>> layer = nn.BatchNorm1d(2)
        >>> with frozen_running_stats(layer):
        ...     layer(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).round().tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    flags = [layer.track_running_stats for layer in layers]
    # A momentum of 0 would count batches all the same, and spread values that are not finite.
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer.track_running_stats = flag
