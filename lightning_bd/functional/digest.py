"""Knowing weights again."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ("weights_sha256",)


def weights_sha256(state_dict: Mapping[str, object]) -> str:
    """Return the SHA-256 hex digest of weights, of their names, shapes, dtypes and values.

    Args:
        state_dict: Name -> tensor; what is no tensor is left out.

    Example:
        >>> weights_sha256({"weight": torch.zeros(2)}) == weights_sha256({"weight": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name]
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
