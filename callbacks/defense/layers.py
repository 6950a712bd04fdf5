"""Finding the layers that a defense works on: by type and by what a forward pass does, never by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.functional.modes import mode

__all__ = ("captured_outputs", "executed_modules", "normalized_convolutions")

_Module = TypeVar("_Module", bound=nn.Module)


@contextmanager
def captured_outputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output tensors of modules, in the order in which they are computed, with their graphs.

    Args:
        modules: The modules to listen to; outputs that are no tensor are left out. Compiled ones run as written.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with captured_outputs(layer) as outputs:
        ...     _ = layer(torch.zeros(4, 2))
        >>> outputs[0].shape
        torch.Size([4, 3])
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        # A compiled module would not call the hooks of its parts.
        with torch.compiler.set_stance("force_eager"):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def executed_modules(
    model: nn.Module, images: Tensor, kind: type[_Module] | tuple[type[_Module], ...]
) -> dict[str, _Module]:
    """Return the modules of a kind by qualified name, in the order in which a forward pass first runs them.

    Args:
        model: The model; runs in evaluation mode, every mode is put back.
        images: ``(B, C, H, W)`` in [0, 1]; one is enough.
        kind: The classes to look for.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> list(executed_modules(model, torch.zeros(1, 1, 4, 4), (nn.Conv2d, nn.Linear)))
        ['0', '3']
    """
    found: dict[str, _Module] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kind):

            def note(module: _Module, _inputs: object, name: str = name) -> None:
                found.setdefault(name, module)

            handles.append(module.register_forward_pre_hook(note))
    try:
        with mode(model, training=False), torch.compiler.set_stance("force_eager"):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.inference_mode(False)
@torch.no_grad()
def normalized_convolutions(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Conv2d, _BatchNorm]]:
    """Return the convolutions whose output goes straight into a batch normalisation, with that layer.

    Found by the tensors themselves, so that it holds for ResNet and VGG (every convolution), PreAct-ResNet (the ones
    that are not added to a shortcut first) and networks of any other names.

    Args:
        model: The model; runs in evaluation mode, every mode is put back.
        images: ``(B, C, H, W)`` in [0, 1]; one is enough.

    Returns:
        Name of the convolution -> convolution and batch normalisation, in the order of execution.
    """
    made: dict[int, tuple[str, nn.Conv2d, Tensor, int]] = {}
    pairs: dict[str, tuple[nn.Conv2d, _BatchNorm]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(module: nn.Conv2d, _inputs: object, output: Tensor, name: str = name) -> None:
                # The tensor is kept too: its id must not be given to another.
                made[id(output)] = (name, module, output, output._version)

            handles.append(module.register_forward_hook(note))
        elif isinstance(module, _BatchNorm):

            def match(module: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
                if inputs and id(inputs[0]) in made:
                    producer, convolution, output, version = made[id(inputs[0])]
                    # Not if something was added, or cut off, in place.
                    if output._version == version:
                        pairs.setdefault(producer, (convolution, module))

            handles.append(module.register_forward_pre_hook(match))
    try:
        with mode(model, training=False), torch.compiler.set_stance("force_eager"):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return pairs
