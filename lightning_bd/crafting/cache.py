"""Images that were crafted before."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_bd.cache import cache_folder, content_key, keep_tensors, read_tensors
from lightning_bd.description import Description

__all__ = ("remembered",)

#: Part of every name; to be raised when the same arguments give other images.
_VERSION = 1


def remembered(
    name: str,
    identity: Description,
    digests: Sequence[bytes],
    labels: Tensor,
    chosen: Tensor,
    shape: Sequence[int],
    compute: Callable[[], Tensor],
    folder: Path | None = None,
) -> Tensor:
    """Return the images that ``compute`` makes, from the cache if they were made before.

    They lie in ``<name>-<SHA-256>.safetensors``, the digest being of all that they depend on. A broken file is made
    anew, and one that cannot be written is left out, both with a warning.

    Args:
        name: Of the method.
        identity: The method with its arguments.
        digests: Of the ``N`` images that it may look at, in an order of their own.
        labels: ``(N,)`` int64.
        chosen: ``(N,)`` bool, which images are made.
        shape: ``(P, C, H, W)`` of the result.
        compute: Returns ``(P, C, H, W)`` uint8.
        folder: Where; ``None``: ``crafting`` in the folder that ``LIGHTNING_BD_CACHE`` names, else in
            ``~/.cache/lightning_bd``.
    """
    facts = {"version": _VERSION, "identity": identity, "shape": list(shape), "images": len(digests)}
    key = content_key(facts, digests, labels, chosen)
    path = (folder or cache_folder("crafting")) / f"{name}-{key}.safetensors"
    found = read_tensors(path, "The file of crafted images", lambda tensors: _checked(tensors, tuple(shape)))
    if found is None:
        found = compute()
        keep_tensors(path, {"images": found}, "The crafted images", "Give another `cache_dir`.")
    return found


def _checked(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    found = tensors.get("images")
    if found is None or found.dtype != torch.uint8 or tuple(found.shape) != shape:
        raise ValueError("it holds no such images")
    return found
