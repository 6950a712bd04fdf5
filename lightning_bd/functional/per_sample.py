"""Sums over samples of squared per-sample gradients of a whole model."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.functional.layer_squares import LayerSquares, in_parts, layer_squares
from lightning_bd.functional.replaced import call_with

__all__ = ("Cotangents", "SquaredGradients")

_log = logging.getLogger(__name__)

Cotangents = Callable[[Tensor], Iterable[Tensor]]
"""Maps logits (B, C) to gradients with respect to them, (B, C) each: one backward pass and one square for each."""

_CPU_MEMORY = 16 * 2**20  # fits the last cache level of common processors
_ACCELERATOR_MEMORY = 512 * 2**20


class SquaredGradients:
    """Running sum over samples of the elementwise squares of the parameters' per-sample gradients.

    A batch is propagated once. In each layer the samples' gradients are formed from the layer's input and the
    gradient of its output, squared, added and dropped. Where that is not possible (other layers own parameters; a
    layer or a parameter is used more than once) the whole model goes through ``torch.func.vmap``, and through a loop
    over the samples if ``vmap`` cannot trace it. A line of the log says so, and why. To find out, the first sample's
    squares are compared with autograd's.

    The model is to be in evaluation mode. Its parameters, their ``.grad`` and ``requires_grad``, and its hooks are
    left as they were.

    Args:
        model: Maps a batch ``(B, ...)`` to logits ``(B, C)``, each sample for itself.
        max_memory: Bytes that the samples' gradients of one layer may take together, positive; one sample is always
            held. None: 16 MiB on a CPU, 512 MiB elsewhere. The whole model counts as one layer in ``vmap``.

    Attributes:
        sums: The sum of squares of each parameter that requires a gradient, by its name; float64 for float64
            parameters, float32 for all others.

    Raises:
        ValueError: If ``max_memory`` is not positive, or a ``BatchNorm`` layer has no running statistics.

    Example:
        >>> squares = SquaredGradients(nn.Linear(1, 2, bias=False))
        >>> squares.add(torch.tensor([[1.0], [2.0]]), lambda logits: [torch.ones_like(logits)])
        >>> squares.sums["weight"].tolist()
        [[5.0], [5.0]]
    """

    def __init__(self, model: nn.Module, max_memory: int | None = None) -> None:
        if max_memory is not None and max_memory <= 0:
            raise ValueError(f"Expected argument `max_memory` to be a positive integer or None, but got {max_memory}.")
        for name, layer in model.named_modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is None:
                raise ValueError(
                    "Expected argument `model` to treat each sample for itself, but got one whose layer"
                    f" {name!r} has no running statistics and mixes the batch."
                )
        self._model = model
        self._max_memory = max_memory
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._method: Literal["layers", "vmap", "loop"] | None = None
        self.sums = {
            # Contiguous, whatever the parameter's memory format: the layers' rules view it as a matrix.
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in self._parameters.items()
        }

    def add(self, inputs: Tensor, cotangents: Cotangents) -> None:
        """Add the squares of one batch.

        Args:
            inputs: The batch ``(B, ...)``, on the model's device; it is not changed.
            cotangents: Called once with the batch's logits, detached.
        """
        if not self._parameters or len(inputs) == 0:
            return
        # A compiled model neither sees hooks that come later nor is worth another compilation.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
            if self._method is None:
                self._method = self._choose_method(inputs[:1])
            if self._method == "layers":
                try:
                    self._add_by_layers(inputs, cotangents, self.sums)
                except _UnsupportedModelError as error:
                    self._method = _fall_back(error)
            if self._method != "layers":
                self._add_whole(inputs, cotangents)

    def _choose_method(self, sample: Tensor) -> Literal["layers", "vmap"]:
        try:
            self._check_layers(sample)
        except _UnsupportedModelError as error:
            return _fall_back(error)
        return "layers"

    def _check_layers(self, sample: Tensor) -> None:
        """Compare the layers' squares with autograd's: a parameter may be used where no hook sees it."""
        logits = self._model(sample.clone())
        # An irregular direction, lest contributions cancel.
        cotangent = torch.arange(logits.numel(), device=logits.device).mul(1.7).cos().view_as(logits).to(logits.dtype)
        expected = torch.autograd.grad(logits, list(self._parameters.values()), cotangent, allow_unused=True)
        sums = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        self._add_by_layers(sample, lambda _: [cotangent], sums)
        squares = [
            torch.zeros_like(total) if gradient is None else gradient.to(total.dtype).square()
            for gradient, total in zip(expected, sums.values(), strict=True)
        ]
        norms = torch.stack(torch._foreach_norm(squares))
        errors = torch.stack(torch._foreach_norm(torch._foreach_sub(list(sums.values()), squares)))
        # The second term lets pass the rounding errors of parameters whose gradient vanishes.
        wrong = errors > 1e-2 * norms + 1e-9 * norms.max()
        for name, is_wrong in zip(sums, wrong.tolist(), strict=True):
            if is_wrong:
                raise _UnsupportedModelError(f"parameter {name!r} is used outside of its layer's forward")

    def _add_by_layers(self, inputs: Tensor, cotangents: Cotangents, sums: dict[str, Tensor]) -> None:
        if not inputs.is_floating_point():
            raise _UnsupportedModelError(f"inputs of {inputs.dtype} have no gradient")
        # With this scalar as the only root autograd forms no gradients of weights. The sum is also a copy, which a
        # layer that works in place may overwrite.
        root = torch.zeros((), dtype=inputs.dtype, device=inputs.device, requires_grad=True)
        with self._hooks(sums, len(inputs)):
            logits = self._model(inputs + root)
            passes = list(cotangents(logits.detach()))
            for index, cotangent in enumerate(passes, start=1):
                torch.autograd.grad(logits, root, cotangent, retain_graph=index < len(passes), allow_unused=True)

    @contextmanager
    def _hooks(self, sums: dict[str, Tensor], size: int) -> Iterator[None]:
        """Attach a hook to each layer that owns a parameter."""
        handles = []
        try:
            for prefix, layer in self._model.named_modules():
                names = {key: f"{prefix}.{key}" if prefix else key for key in layer._parameters}
                totals = {key: sums[name] for key, name in names.items() if name in sums}
                if not totals:
                    continue
                add = layer_squares(layer)
                if add is None:
                    raise _UnsupportedModelError(f"layer {prefix!r} is a {type(layer).__name__}")
                hook = _LayerHook(prefix, add, totals, size, self._memory(next(iter(totals.values()))))
                handles.append(layer.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_whole(self, inputs: Tensor, cotangents: Cotangents) -> None:
        with torch.no_grad():
            passes = list(cotangents(self._model(inputs.clone())))
        bytes_per_sample = sum(p.numel() * p.element_size() for p in self._parameters.values())
        size = max(1, self._memory(inputs) // bytes_per_sample)
        for cotangent in passes:
            for part, direction in in_parts(inputs, cotangent, size):
                if self._method == "vmap":
                    try:
                        gradients = self._vmap_gradients(part, direction)
                    except RuntimeError as error:
                        reason = str(error).partition("\n")[0]
                        _log.info(
                            "Per-sample gradients in a loop over the samples, as torch.func.vmap fails: %s", reason
                        )
                        self._method = "loop"
                    else:
                        for name, gradient in gradients.items():
                            self.sums[name].add_(gradient.to(self.sums[name].dtype).square_().sum(0))
                if self._method == "loop":
                    self._add_by_loop(part, direction)

    def _vmap_gradients(self, inputs: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in self._parameters.items()}

        def gradient(x: Tensor, direction: Tensor) -> dict[str, Tensor]:
            def logits(weights: dict[str, Tensor]) -> Tensor:
                return call_with(self._model, weights, x[None].clone())

            weight_gradients: dict[str, Tensor] = vjp(logits, parameters)[1](direction[None])[0]
            return weight_gradients

        gradients: dict[str, Tensor] = vmap(gradient)(inputs, cotangent)
        return gradients

    def _add_by_loop(self, inputs: Tensor, cotangent: Tensor) -> None:
        parameters = list(self._parameters.values())
        for x, direction in in_parts(inputs, cotangent, 1):
            gradients = torch.autograd.grad(self._model(x.clone()), parameters, direction, allow_unused=True)
            for total, gradient in zip(self.sums.values(), gradients, strict=True):
                if gradient is not None:
                    gradient = gradient.to(total.dtype)
                    total.addcmul_(gradient, gradient)

    def _memory(self, tensor: Tensor) -> int:
        return self._max_memory or (_CPU_MEMORY if tensor.device.type == "cpu" else _ACCELERATOR_MEMORY)


class _UnsupportedModelError(Exception):
    """The model uses its layers in a way that the layers' rules do not cover."""


def _fall_back(reason: _UnsupportedModelError) -> Literal["vmap"]:
    _log.info("Per-sample gradients of the whole model through torch.func.vmap, for %s.", reason)
    return "vmap"


class _LayerHook:
    """Forward hook that adds the squares of one layer when its output's gradient arrives."""

    def __init__(self, name: str, add: LayerSquares, totals: dict[str, Tensor], size: int, memory: int) -> None:
        self._name, self._called = name, False
        self._add, self._totals, self._size, self._memory = add, totals, size, memory
        self._dtype = next(iter(totals.values())).dtype

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._called:
            raise _UnsupportedModelError(f"layer {self._name!r} is called more than once")
        self._called = True
        if len(args) != 1 or args[0].ndim < 2 or len(args[0]) != self._size or not output.requires_grad:
            raise _UnsupportedModelError(f"layer {self._name!r} does not map samples to samples")
        x = args[0].detach()

        def add(gradient: Tensor) -> None:
            with torch.no_grad():
                self._add(layer, x.to(self._dtype), gradient.to(self._dtype), self._totals, self._memory)

        output.register_hook(add)  # type: ignore[no-untyped-call]
