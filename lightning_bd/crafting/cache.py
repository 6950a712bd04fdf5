"""Images that were crafted before."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_bd.cache import cache_folder, write_whole
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
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for image in digests:
        digest.update(image)
    for tensor in (labels.to(torch.int64), chosen.to(torch.int64)):
        digest.update(tensor.cpu().contiguous().numpy().data)
    path = (folder or cache_folder("crafting")) / f"{name}-{digest.hexdigest()}.safetensors"
    found = _read(path, tuple(shape))
    if found is None:
        found = compute()
        try:
            # As bytes: safetensors reports a full disk by an error of its own.
            content = save({"images": found.contiguous()})
            write_whole(path, lambda file: file.write_bytes(content))
        except OSError as error:
            warnings.warn(
                f"The crafted images could not be kept for the next run: {error}. Give another `cache_dir`.",
                stacklevel=2,
            )
    return found


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    if not path.exists():
        return None
    try:
        found = load(path.read_bytes()).get("images")
        if found is None or found.dtype != torch.uint8 or tuple(found.shape) != shape:
            raise ValueError("it holds no such images")
    except (OSError, ValueError, SafetensorError) as error:
        warnings.warn(f"The file of crafted images {path} is broken and made anew: {error}", stacklevel=3)
        return None
    return found
