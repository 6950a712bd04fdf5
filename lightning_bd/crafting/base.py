"""Images that an attacker makes one by one, ahead of training."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_bd.description import Description, describe

__all__ = ("AbsentCrafting", "Crafting")


class Crafting(ABC):
    """Makes the images that take the place of those to be poisoned; an argument of a static poison.

    Which images are poisoned, and their labels, is decided by :class:`~lightning_bd.poisoning.Poison`. Where the result
    is not final the poison's trigger is put on top. A subclass keeps every ``__init__`` argument that changes the
    images as an attribute of the same name, and depends on images, labels and arguments alone, never on the global
    random state or on the order of the data set.

    Example:
        >>> class Inverted(Crafting):
        ...     def craft(self, chosen, positions, labels, read):
        ...         return 255 - read(chosen)
        >>> pixels = torch.tensor([0, 9], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> Inverted().craft(torch.tensor([1]), torch.arange(2), torch.zeros(2), pixels.__getitem__).tolist()
        [[[[246]]]]
    """

    #: Whether the images are final; else the trigger is put on top.
    includes_trigger: ClassVar[bool] = False
    #: Whether it makes sense only for images that keep their label.
    needs_clean_label: ClassVar[bool] = False

    @abstractmethod
    def craft(self, chosen: Tensor, positions: Tensor, labels: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Make the images.

        Args:
            chosen: ``(P,)`` int64, increasing: positions in the training set of the images to be poisoned.
            positions: ``(N,)`` int64, those of all images of the split.
            labels: ``(N,)`` int64, the true labels of ``positions``.
            read: Returns the clean images ``(B, C, H, W)`` uint8 at positions ``(B,)``.

        Returns:
            ``(P, C, H, W)`` uint8, in the order of ``chosen``.
        """

    def available(self, positions: Tensor) -> Tensor:
        """Return which training images can be made, as ``(B,)`` bool for ``positions`` ``(B,)``; by default all."""
        return torch.ones_like(positions, dtype=torch.bool)

    def check(self, total: int) -> None:
        """Refuse a training set that it does not fit; by default none. Called before anything is made.

        Args:
            total: Number of training images.
        """
        return

    def attack_images(self, image_shape: tuple[int, int, int], total: int) -> tuple[Tensor, Tensor] | None:
        """Return test images that were made elsewhere; by default ``None``: the poison's trigger makes them.

        Args:
            image_shape: ``(C, H, W)`` of the data set's images.
            total: Number of test images.

        Returns:
            Positions ``(A,)`` in the test set, increasing, and images ``(A, C, H, W)`` uint8.
        """
        return None

    def attack_digest(self) -> str | None:
        """Return a SHA-256 hex digest of the test images that were made elsewhere; ``None`` if there are none."""
        return None

    def limits(self) -> str:
        """Say in a few words what limits :meth:`available`, for messages; empty if nothing does."""
        return ""

    def facts(self) -> dict[str, Description]:
        """Describe it as plain values without paths, for the manifest: ``class``, ``arguments``, ``attack_images``."""
        described = describe(self)
        assert isinstance(described, dict)
        arguments = {name: value for name, value in described.items() if name != "class"}
        return {"class": type(self).__qualname__, "arguments": arguments, "attack_images": self.attack_digest()}


class AbsentCrafting(Crafting):
    """Stands for a crafting that a checkpoint names and no config gives: the attack can be measured, not repeated.

    Args:
        manifest: What the checkpoint says of it.
    """

    def __init__(self, manifest: Mapping[str, Description]) -> None:
        self.manifest = dict(manifest)

    def check(self, total: int) -> None:
        """Refuse to poison training images.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"The training images of this attack were crafted by {self.manifest.get('class')}, which a checkpoint does "
            "not hold. Give `data.poison` with the `crafting` that the model was trained with."
        )

    def craft(self, chosen: Tensor, positions: Tensor, labels: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Refuse, as :meth:`check` does."""
        self.check(len(positions))
        raise AssertionError

    def facts(self) -> dict[str, Description]:
        """Return what the checkpoint says."""
        return dict(self.manifest)
