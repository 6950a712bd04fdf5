"""Sensitivity of a model's output to each of its parameters."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.functional.modes import mode
from lightning_bd.functional.replaced import call_with

__all__ = ("memory_aware_importance", "memory_aware_sums")

_log = logging.getLogger(__name__)

_CPU_MEMORY = 16 * 2**20
_ACCELERATOR_MEMORY = 512 * 2**20

_Tensors = dict[str, Tensor]


def memory_aware_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_samples: int | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
) -> dict[str, Tensor]:
    r"""Mean over samples of the absolute gradient of the output's squared norm, for each parameter.

    .. math::
        \Omega_i = \frac{1}{N} \sum_{n=1}^{N} \left| \frac{\partial \lVert f(x_n) \rVert_2^2}{\partial \theta_i} \right|

    The importance of Memory Aware Synapses (`Aljundi et al., 2018 <https://arxiv.org/abs/1711.09601>`_). No label is
    looked at. The absolute value is taken for each sample by itself, never after a mean over a batch, in which the
    signs would cancel. The model is evaluated in evaluation mode and left as it was: weights, buffers, ``.grad`` and
    flags. The global random state is not advanced. Memory does not grow with the number of samples.

    Args:
        model: Maps inputs ``(B, ...)`` to an output ``(B, ...)``, each sample for itself.
        batches: Batches on the model's device; ``batch[0]`` are the inputs.
        num_samples: Stop after so many samples, positive; None takes all batches.
        chunk_size: Samples whose gradients are formed together, positive, if ``max_memory`` allows. None: 32 on a CPU,
            128 elsewhere.
        max_memory: Bytes that the per-sample gradients may take together, positive; one sample is always held. None:
            16 MiB on a CPU, 512 MiB elsewhere. It changes the result by rounding at most.

    Returns:
        The importance by parameter name, for the parameters that require a gradient; float32, or float64 for float64
        parameters.

    Raises:
        ValueError: If an argument is out of range, there is no sample, or a ``BatchNorm`` layer has no running
            statistics.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> memory_aware_importance(model, [(torch.tensor([[2.0], [0.0]]),)])  # (2 * 6 * 2 + 0) / 2
        {'weight': tensor([[12.]])}
    """
    sums, count = memory_aware_sums(
        model, batches, num_samples=num_samples, chunk_size=chunk_size, max_memory=max_memory
    )
    if count == 0:
        raise ValueError("Expected argument `batches` to hold at least one sample, but got none.")
    return {name: total.div_(count) for name, total in sums.items()}


def memory_aware_sums(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_samples: int | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Numerator and denominator of :func:`memory_aware_importance`, to be added up over processes before the division.

    Args:
        model: As for :func:`memory_aware_importance`, and so are all others.
        batches: Batches on the model's device; they may be none.
        num_samples: Stop after so many samples; 0 takes none.
        chunk_size: Samples whose gradients are formed together.
        max_memory: Bytes that the per-sample gradients may take together.

    Returns:
        The sums of absolute gradients by parameter name, and the number of samples.

    Raises:
        ValueError: If an argument is out of range, or a ``BatchNorm`` layer has no running statistics.

    Example:
        >>> sums, count = memory_aware_sums(nn.Linear(1, 2), [(torch.ones(3, 1),)])
        >>> count, list(sums)
        (3, ['weight', 'bias'])
    """
    if num_samples is not None and num_samples < 0:
        raise ValueError(
            f"Expected argument `num_samples` to be a non-negative integer or None, but got {num_samples}."
        )
    for name, value in (("chunk_size", chunk_size), ("max_memory", max_memory)):
        if value is not None and value <= 0:
            raise ValueError(f"Expected argument `{name}` to be a positive integer or None, but got {value}.")
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise ValueError(
                "Expected argument `model` to treat each sample for itself, but got one whose layer"
                f" {name!r} has no running statistics and mixes the batch."
            )
    gradients = _OutputGradients(model)
    count = 0
    # A compiled model is not worth another compilation.
    with _evaluated(model), torch.compiler.set_stance("force_eager"):
        for inputs in _chunks(batches, num_samples, chunk_size, gradients.bytes_per_sample, max_memory):
            with torch.autocast(inputs.device.type, enabled=False):
                gradients.add(inputs)
            count += len(inputs)
    return gradients.sums, count


class _OutputGradients:
    """Running sum of absolute per-sample gradients, through ``vmap`` or, where that fails, one sample at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        # Whatever the model writes goes to copies.
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._vmap = True
        self.bytes_per_sample = sum(p.nbytes for p in self._parameters.values())
        self.sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self._parameters.items()
        }

    def add(self, inputs: Tensor) -> None:
        """Add the absolute gradients of a chunk ``(B, ...)``."""
        if self._vmap and len(inputs) > 1:
            try:
                gradients: _Tensors = vmap(grad(self._squared_norm), in_dims=(None, 0))(self._parameters, inputs)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                _log.info("Per-sample gradients in a loop over the samples, as torch.func.vmap fails: %s", reason)
                self._vmap = False
            else:
                for name, total in self.sums.items():
                    total += gradients[name].to(total.dtype).abs().sum(0)
                return
        for x in inputs:
            with torch.enable_grad():
                parameters = {name: p.detach().requires_grad_() for name, p in self._parameters.items()}
                norm = self._squared_norm(parameters, x)
            ones = torch.autograd.grad(norm, list(parameters.values()), allow_unused=True)
            for total, one in zip(self.sums.values(), ones, strict=True):
                if one is not None:
                    total += one.to(total.dtype).abs_()

    def _squared_norm(self, parameters: _Tensors, x: Tensor) -> Tensor:
        return call_with(self._model, {**self._buffers, **parameters}, x[None].clone()).square().sum()


def _chunks(
    batches: Iterable[Any],
    num_samples: int | None,
    chunk_size: int | None,
    bytes_per_sample: int,
    max_memory: int | None,
) -> Iterator[Tensor]:
    left = num_samples
    if left == 0:
        return
    for batch in batches:
        inputs: Tensor = batch[0][:left]
        on_cpu = inputs.device.type == "cpu"
        memory = max_memory or (_CPU_MEMORY if on_cpu else _ACCELERATOR_MEMORY)
        size = max(1, min(chunk_size or (32 if on_cpu else 128), memory // max(bytes_per_sample, 1)))
        yield from (inputs[start : start + size] for start in range(0, len(inputs), size))
        if left is not None:
            left -= len(inputs)
            if left == 0:
                return


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode; put back the modes and the random state, also after an exception."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), mode(model, training=False):
        yield
