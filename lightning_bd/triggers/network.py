"""The base of triggers that are made by a small network."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_bd.functional.draws import keyed_global_state
from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("NetworkTrigger",)

_LARGEST = torch.finfo(torch.float32).max


class NetworkTrigger(Trigger):
    """A trigger whose tensors are the weights of a network, so that they travel with a checkpoint.

    A subclass implements ``_network`` (the untrained module) and ``_transform``, which calls :meth:`run_network`. The
    initial weights are drawn from ``seed``; a subclass that gets them otherwise overrides ``_compute``. The network is
    frozen and in evaluation mode; a model that trains it asks for gradients itself.

    Args:
        seed: Seed of the initial weights.

    Example:
        >>> class Recolor(NetworkTrigger):
        ...     def _network(self, image_shape: tuple[int, int, int]) -> nn.Module:
        ...         return nn.Conv2d(image_shape[0], image_shape[0], kernel_size=1)
        ...
        ...     def _transform(self, images: Tensor) -> Tensor:
        ...         return self.run_network(images).sigmoid()
        >>> trigger = Recolor(seed=1)
        >>> trigger(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
        >>> list(trigger.state_dict())
        ['network.weight', 'network.bias']
    """

    network: nn.Module

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def run_network(self, images: Tensor, part: nn.Module | None = None) -> Tensor:
        """Return what the network makes of images, in float32 whatever precision the model trains in.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            part: A submodule to call in place of the whole network.
        """
        with torch.autocast(images.device.type, enabled=False):
            output: Tensor = (self.network if part is None else part)(images.float())
        return output

    @abstractmethod
    def _network(self, image_shape: tuple[int, int, int]) -> nn.Module:
        """Return the untrained network for images of this shape; raise ValueError where it does not fit them.

        Its state must be float32 and all in ``state_dict``, and what it makes of an image must not depend on the rest
        of the batch: no BatchNorm. It is also built without memory for its weights, so it must not compute with them.
        """

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {
            f"network.{name}": TensorSpec(tuple(tensor.shape), -_LARGEST, _LARGEST)
            for name, tensor in self._on_meta(image_shape).state_dict().items()
        }

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        with keyed_global_state(self.seed, "network trigger"), torch.device("cpu"):
            network = self._network(image_shape).float()
        return {f"network.{name}": tensor.detach() for name, tensor in network.state_dict().items()}

    def _adopt(self, image_shape: tuple[int, int, int], tensors: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False):
            network = self._on_meta(image_shape)
            weights = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
            network.load_state_dict(weights, assign=True)
            self.network = network.eval().requires_grad_(False)
        super()._adopt(image_shape, {})

    def _on_meta(self, image_shape: tuple[int, int, int]) -> nn.Module:
        """Make the network without memory, so that a file cannot ask for more than it brings."""
        with torch.device("meta"):
            return self._network(image_shape)
