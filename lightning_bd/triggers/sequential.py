"""SequentialTrigger: several triggers on one image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bd.triggers.base import Trigger
from lightning_bd.triggers.composite import CompositeTrigger

__all__ = ("SequentialTrigger",)


class SequentialTrigger(CompositeTrigger):
    """Put several triggers on an image, one after the other.

    The image that one trigger gives is what the next one changes. A cover sample is made by the covers of all of them,
    in the same order. A trigger may itself be made of others.

    Args:
        triggers: The triggers in order; at least one. They become parts of this one: no other may use them for images
            of another shape.

    Raises:
        ValueError: If ``triggers`` is empty or holds something else.

    Example:
        >>> from lightning_bd.triggers import SIG, BadNets
        >>> trigger = SequentialTrigger([SIG(amplitude=0.1, frequency=1.0), BadNets(size=1, pattern="white")])
        >>> trigger(torch.full((1, 1, 2, 4), 0.5))[0, 0]
        tensor([[0.5000, 0.6000, 0.5000, 0.4000],
                [0.5000, 0.6000, 0.5000, 1.0000]])
    """

    def __init__(self, triggers: Sequence[Trigger]) -> None:
        super().__init__()
        if (
            not isinstance(triggers, Sequence)
            or not triggers
            or not all(isinstance(trigger, Trigger) for trigger in triggers)
        ):
            raise ValueError(f"Expected argument `triggers` to be at least one trigger, but got {triggers!r}.")
        for number, trigger in enumerate(triggers):
            self.add_module(str(number), trigger)

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """The triggers, in order."""
        return tuple(self._parts().values())

    def attack(self, images: Tensor) -> Tensor:
        """Put on each trigger as it is at test time.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        for trigger in self.triggers:
            images = trigger.attack(images)
        return images

    def cover(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Apply the covers of all triggers, in order.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.
            generator: CPU generator that they draw from in turn; ``None`` is torch's global one.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        for trigger in self.triggers:
            images = trigger.cover(images, generator)
        return images

    def _transform(self, images: Tensor) -> Tensor:
        for trigger in self.triggers:
            images = trigger(images)
        return images
