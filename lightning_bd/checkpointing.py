"""Checkpoints: written atomically, read without executing anything that is in them."""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn

from lightning_bd.files import open_atomically

__all__ = (
    "RECORD_KEY",
    "TRIGGER_KEY",
    "AtomicCheckpointIO",
    "CheckpointError",
    "check_weights",
    "read_checkpoint",
    "save_atomically",
)

#: Our own entry in a checkpoint; Lightning does not look at it.
RECORD_KEY = "lightning_bd"
#: The weights of a trigger that was trained with the model, in a checkpoint of any Trainer.
TRIGGER_KEY = "lightning_bd_trigger"

# What torch.load raises for files that are cut or have wrong bytes.
_BROKEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint is missing, broken, not to be trusted, or does not fit the model."""


def save_atomically(value: object, path: Path) -> None:
    """Write ``value`` with ``torch.save`` so that ``path`` is either the old file or the whole new one.

    Args:
        value: Tensors and plain builtins.
        path: Where; its folder is made.
    """
    with open_atomically(path) as file:
        torch.save(value, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: A file of this library, of Lightning, or any other that holds tensors and plain builtins only.

    Returns:
        The checkpoint, with tensors on the CPU.

    Raises:
        CheckpointError: If the file is missing, broken, needs to unpickle other objects, or holds no weights.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint {path}. A finished phase leaves one at <run>/NN_<phase>/final.ckpt."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The rest of torch's message advises to load it all the same.
        reason = re.search(r".*(GLOBAL|Unsupported|Unsafe).*", str(error))
        raise CheckpointError(
            f"Refused to load {path}: it holds more than tensors and plain values, so that loading it could run code "
            f"of whoever made it. Nothing was executed.{f' ({reason[0].strip()})' if reason else ''}"
        ) from None
    except _BROKEN as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"Cannot read the checkpoint {path}: the file is broken. ({problem})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} is not a Lightning checkpoint: it has no `state_dict`.")
    return checkpoint


def check_weights(model: nn.Module, state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Check that saved weights fit a model, name by name.

    Args:
        model: The model that the weights are for.
        state_dict: The saved weights.
        path: Where they came from, for the message.

    Raises:
        CheckpointError: If they do not fit; the message names the first mismatch.
    """
    expected = model.state_dict()
    problem = None
    for name, tensor in expected.items():
        if name not in state_dict:
            problem = f"`{name}` {tuple(tensor.shape)} is not in the checkpoint"
        elif not isinstance(state_dict[name], Tensor):
            problem = f"`{name}` is no tensor there"
        elif state_dict[name].shape != tensor.shape:
            problem = f"`{name}` is {tuple(state_dict[name].shape)} there and {tuple(tensor.shape)} in the model"
        if problem is not None:
            break
    if problem is None:
        problem = next((f"the model has no `{name}`" for name in state_dict if name not in expected), None)
    if problem is not None:
        raise CheckpointError(
            f"The checkpoint {path} is of another model: {problem}. Use the config that it was trained with."
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer, but atomic; its reader, but never unpickling other objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint atomically."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes to local folders and takes no `storage_options`.")
        save_atomically(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: object = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint on the CPU without executing anything in it."""
        return read_checkpoint(Path(path))
