"""What encoders share that are networks: weights read from disk with care, features read off a forward pass."""

import hashlib
import pickle
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_bd.description import Description, describe
from lightning_bd.functional.modes import mode
from lightning_bd.selection.encoders import Encoder

__all__ = ("NetworkEncoder", "load_weights", "penultimate", "read_weights")


class NetworkEncoder(Encoder):
    """Features that a network makes for its last linear layer; weights are read when they are first needed."""

    weights: Path

    def __init__(self, weights: str | Path, device: str, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be a positive integer, but got {batch_size}.")
        self.weights = Path(weights)
        self.batch_size = batch_size
        # Not under the argument's name: the same features, wherever they are computed.
        self._device = torch.device(device)
        self._network: nn.Module | None = None

    @abstractmethod
    def _build(self) -> nn.Module:
        """Return the network with its weights."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(B, D)`` of images ``(B, C, H, W)`` as the network wants them."""
        if self._network is None:
            self._network = self._build().to(self._device)
        return penultimate(self._network, images.to(self._device))

    def identity(self) -> Description:
        """Describe the arguments, and the weights by their content instead of by where they lie."""
        described = describe(self)
        assert isinstance(described, dict)
        described = {name: value for name, value in described.items() if name not in ("weights", "batch_size")}
        _check_there(self.weights)
        with self.weights.open("rb") as file:
            return {**described, "weights_sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def penultimate(network: nn.Module, images: Tensor) -> Tensor:
    """Return the input of the linear layer that makes a network's output, in evaluation mode.

    Args:
        network: Any network whose output is that of a linear layer; modes are put back.
        images: ``(B, C, H, W)``, on the network's device.

    Returns:
        ``(B, D)``, without a graph.

    Raises:
        ValueError: If the network does not end so.

    Example:
        >>> penultimate(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 1, 2, 2))
        tensor([[1., 1., 1., 1.]])
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [(inputs[0], output)]

    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in linear]
    try:
        with mode(network, training=False), torch.compiler.set_stance("force_eager"):
            logits = network(images)
    finally:
        for handle in handles:
            handle.remove()
    if not seen or seen[0][0].ndim != 2 or not torch.equal(seen[0][1], logits):
        raise ValueError(
            f"The output of `{type(network).__name__}` is not that of a linear layer, so that it is not known what its "
            "features are. Use another network, or subclass Encoder."
        )
    return seen[0][0].detach()


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no encoder weights {path.absolute()}. Nothing is downloaded: put the file there, or set the "
            "encoder's `weights` to where it lies."
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file by name, without executing anything that is in it.

    Args:
        path: A ``state_dict``, or a mapping that has one under ``state_dict``; ``module.`` before names is dropped.
            Read as safetensors if it is called so, else as ``torch.save`` writes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is broken, not to be trusted, or holds no weights.
    """
    _check_there(path)
    try:
        found = _read(path)
    except pickle.UnpicklingError:
        raise ValueError(
            f"Refused to load {path}: it holds more than tensors and plain values, so that loading it could run code "
            "of whoever made it. Nothing was executed."
        ) from None
    # What torch.load raises for files that are cut or have wrong bytes.
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        safetensors.SafetensorError,
    ) as error:
        raise ValueError(f"Cannot read the encoder weights {path}: the file is broken.") from error
    saved = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not isinstance(saved, Mapping) or not saved or not all(isinstance(value, Tensor) for value in saved.values()):
        raise ValueError(f"The encoder weights {path} are no `state_dict`: names and tensors.")
    return {str(name).removeprefix("module."): tensor for name, tensor in saved.items()}


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(network: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    """Put saved weights into a network, all of them.

    Args:
        network: The network.
        saved: Name -> tensor.
        path: Where they came from, for the message.

    Raises:
        ValueError: If they do not fit.
    """
    try:
        network.load_state_dict(saved)
    except RuntimeError as error:
        problem = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise ValueError(f"The encoder weights {path} are of another network: {problem}") from error
