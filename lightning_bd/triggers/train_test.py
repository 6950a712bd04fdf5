"""TrainTestTrigger: one trigger in the training set, another in the attack."""

import torch
from torch import Tensor

from lightning_bd.triggers.base import Trigger
from lightning_bd.triggers.composite import CompositeTrigger

__all__ = ("TrainTestTrigger",)


class TrainTestTrigger(CompositeTrigger):
    """Poison with one trigger and attack with another, usually the same at another strength.

    What adaptive attacks need: a faint trigger in the training set is hard to see and to separate from clean images, a
    strong one at test time makes up for it (`Qi et al., 2023 <https://openreview.net/forum?id=_wSHsgrVali>`_, for SIG
    already `Barni et al., 2019 <https://arxiv.org/abs/1902.11237>`_). Training images, also when they are replayed,
    and cover samples get the training trigger; the attack test set, on which attack success is measured, gets the
    other one.

    Args:
        training_trigger: Trigger of poisoned training images and of covers.
        test_trigger: Trigger of the attack test set. Give it the same seed and pattern: nothing else makes the two
            one attack.

    Raises:
        ValueError: If one is no trigger.

    Example:
        >>> from lightning_bd.triggers import SIG
        >>> trigger = TrainTestTrigger(SIG(amplitude=0.1, frequency=1.0), SIG(amplitude=0.3, frequency=1.0))
        >>> grey = torch.full((1, 1, 1, 4), 0.5)
        >>> trigger(grey)[0, 0], trigger.attack(grey)[0, 0]
        (tensor([[0.5000, 0.6000, 0.5000, 0.4000]]), tensor([[0.5000, 0.8000, 0.5000, 0.2000]]))
    """

    def __init__(self, training_trigger: Trigger, test_trigger: Trigger) -> None:
        super().__init__()
        for name, trigger in (("training_trigger", training_trigger), ("test_trigger", test_trigger)):
            if not isinstance(trigger, Trigger):
                raise ValueError(f"Expected argument `{name}` to be a trigger, but got {trigger!r}.")
        self.training_trigger = training_trigger
        self.test_trigger = test_trigger

    def attack(self, images: Tensor) -> Tensor:
        """Put the test trigger on every image of a batch.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        return self.test_trigger.attack(images)

    def cover(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Apply the training trigger's cover.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.
            generator: CPU generator of the random draws; ``None`` is torch's global one.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        return self.training_trigger.cover(images, generator)

    def _transform(self, images: Tensor) -> Tensor:
        triggered: Tensor = self.training_trigger(images)
        return triggered
