"""Calling a module with other tensors in place of its own."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ("call_with",)


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Call ``module`` on ``inputs`` with ``tensors`` in place of its parameters and buffers of these names.

    As ``torch.func.functional_call``, which also replaces tied parameters together, but safe with a layer that is
    registered under two names: the module has its own tensors back afterwards, after an exception too.

    Args:
        module: Maps a tensor to a tensor.
        tensors: Replacements by the names that ``named_parameters()`` and ``named_buffers()`` give; where distinct
            layers share a parameter one name is enough. What is not named keeps its own tensor.
        inputs: What the module is called with.

    Returns:
        What the module returns.

    Raises:
        ValueError: If there is no parameter or buffer of a name.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> before = layer.weight
        >>> call_with(layer, {"weight": torch.tensor([[1.0, 2.0]])}, torch.ones(1, 2))
        tensor([[3.]])
        >>> layer.weight is before
        True
    """
    own = _places(module)
    unknown = sorted(tensors.keys() - own.keys())
    if unknown:
        raise ValueError(
            f"Expected argument `tensors` to name parameters and buffers of `{type(module).__name__}`, but got"
            f" {unknown}."
        )
    shared = {id(own[name]): tensor for name, tensor in tensors.items()}
    replaced = {name: tensors.get(name, shared[id(old)]) for name, old in own.items() if id(old) in shared}
    # To tie weights torch would swap the same place under each of its names, and put the replacement back.
    output: Tensor = functional_call(module, replaced, (inputs,), tie_weights=False)
    return output


def _places(module: nn.Module) -> dict[str, Tensor]:
    """Where parameters and buffers lie: each module once, a tensor as often as distinct modules hold it."""
    return {
        f"{prefix}.{key}" if prefix else key: tensor
        for prefix, layer in module.named_modules()
        for key, tensor in [*layer._parameters.items(), *layer._buffers.items()]
        if tensor is not None
    }
