"""What is slow to compute and kept for the next run: its names, where it lies, how it is written and read."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_bd.files import open_atomically

__all__ = ("cache_folder", "content_key", "keep_tensors", "read_tensors")

T = TypeVar("T")


def cache_folder(kind: str) -> Path:
    """Return ``$LIGHTNING_BD_CACHE/<kind>`` or ``~/.cache/lightning_bd/<kind>``; it need not exist.

    Args:
        kind: What lies there.
    """
    root = os.environ.get("LIGHTNING_BD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "lightning_bd") / kind


def content_key(facts: Mapping[str, object], digests: Iterable[bytes], *tensors: Tensor) -> str:
    """Return the SHA-256 hex digest of all that a result depends on.

    Args:
        facts: What was done, with which arguments, as plain values; their order does not matter.
        digests: Of the images, of one length each; their order counts, their number should be among the facts.
        tensors: Integers or booleans; compared as int64.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for image in digests:
        digest.update(image)
    for tensor in tensors:
        digest.update(tensor.to("cpu", torch.int64).contiguous().numpy().data)
    return digest.hexdigest()


def keep_tensors(path: Path, tensors: Mapping[str, Tensor], what: str, cure: str | None = None) -> None:
    """Write tensors for the next run; where that fails, only a warning comes of it.

    Args:
        path: Where; its folder is made.
        tensors: Name -> tensor.
        what: What they are, for the warning: "The encoder".
        cure: What the user can do; by default, to set the environment variable.
    """
    try:
        with open_atomically(path) as file:
            file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
    except OSError as error:
        cure = cure or "Make room, or set the environment variable LIGHTNING_BD_CACHE to a folder that can be written."
        warnings.warn(f"{what} could not be kept for the next run: {error}. {cure}", stacklevel=3)


def read_tensors(path: Path, what: str, use: Callable[[dict[str, Tensor]], T]) -> T | None:
    """Read what :func:`keep_tensors` wrote; a broken file is left to be made anew, with a warning.

    Args:
        path: The file.
        what: What it holds, for the warning: "The encoder".
        use: Takes the tensors and returns the result; raises ``ValueError`` or ``RuntimeError`` if they are not right.

    Returns:
        The result of ``use``; ``None`` if there is no sound file.
    """
    if not path.exists():
        return None
    try:
        return use(load(path.read_bytes()))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        warnings.warn(f"{what} in {path} is broken and made anew: {error}", stacklevel=3)
        return None
