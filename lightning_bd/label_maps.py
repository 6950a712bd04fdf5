"""Which label an attacker gives to a triggered image."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ("AllToAll", "AllToOne", "LabelMap", "SourceSpecific")


class LabelMap(ABC):
    """A rule from original labels to the attacker's labels."""

    @abstractmethod
    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels for ``labels`` ``(B,)`` int64."""

    @abstractmethod
    def validate(self, num_classes: int) -> None:
        """Raise ``ValueError`` if the rule names a class outside ``[0, num_classes)``."""

    @abstractmethod
    def describe(self) -> dict[str, int | list[int]]:
        """Return the constructor's arguments as plain values."""

    def sources(self, labels: Tensor) -> Tensor:
        """Return which of ``labels`` ``(B,)`` the attack applies to, as ``(B,)`` bool; by default all."""
        return torch.ones_like(labels, dtype=torch.bool)


class AllToOne(LabelMap):
    """Every image becomes ``target``.

    Args:
        target: The attacker's class.

    Example:
        >>> AllToOne(0)(torch.tensor([3, 1]), num_classes=10)
        tensor([0, 0])
    """

    def __init__(self, target: int) -> None:
        self.target = target

    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return ``target`` for each label."""
        return torch.full_like(labels, self.target)

    def validate(self, num_classes: int) -> None:
        """Raise ``ValueError`` if the target is not a class."""
        _check_class("target", self.target, num_classes)

    def describe(self) -> dict[str, int | list[int]]:
        """Return the constructor's arguments as plain values."""
        return {"target": self.target}


class AllToAll(LabelMap):
    """Class ``y`` becomes ``(y + shift) mod num_classes``.

    Args:
        shift: Distance to the attacker's class, not a multiple of the number of classes; the papers use 1.

    Example:
        >>> AllToAll()(torch.tensor([3, 9]), num_classes=10)
        tensor([4, 0])
    """

    def __init__(self, shift: int = 1) -> None:
        self.shift = shift

    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return each label's successor."""
        return (labels + self.shift) % num_classes

    def validate(self, num_classes: int) -> None:
        """Raise ``ValueError`` if every label would stay as it is."""
        _check_integer("shift", self.shift)
        if self.shift % num_classes == 0:
            raise ValueError(
                f"Expected argument `shift` not to be a multiple of the {num_classes} classes, but got {self.shift}."
            )

    def describe(self) -> dict[str, int | list[int]]:
        """Return the constructor's arguments as plain values."""
        return {"shift": self.shift}


class SourceSpecific(LabelMap):
    """Only images of ``sources`` become ``target``; the trigger must not work on others.

    Args:
        sources: The classes that the attack applies to.
        target: The attacker's class.

    Example:
        >>> rule = SourceSpecific(sources=[1], target=0)
        >>> rule(torch.tensor([1, 2]), num_classes=10), rule.sources(torch.tensor([1, 2]))
        (tensor([0, 2]), tensor([ True, False]))
    """

    def __init__(self, sources: Sequence[int], target: int) -> None:
        if not sources or target in sources:
            raise ValueError(
                f"Expected argument `sources` to name classes other than the target {target}, but got {list(sources)}."
            )
        self.source_classes = list(sources)
        self.target = target

    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return ``target`` for labels among the sources, the label itself for others."""
        return torch.where(self.sources(labels), self.target, labels)

    def sources(self, labels: Tensor) -> Tensor:
        """Return which of ``labels`` ``(B,)`` are source classes, as ``(B,)`` bool."""
        return torch.isin(labels, torch.tensor(self.source_classes, device=labels.device))

    def validate(self, num_classes: int) -> None:
        """Raise ``ValueError`` if target or a source is not a class."""
        _check_class("target", self.target, num_classes)
        for source in self.source_classes:
            _check_class("sources", source, num_classes)

    def describe(self) -> dict[str, int | list[int]]:
        """Return the constructor's arguments as plain values."""
        return {"sources": self.source_classes, "target": self.target}


def _check_integer(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"Expected argument `{name}` to be an integer, but got {value!r}.")


def _check_class(name: str, value: int, num_classes: int) -> None:
    _check_integer(name, value)
    if not 0 <= value < num_classes:
        raise ValueError(f"Expected argument `{name}` to be a class in [0, {num_classes}), but got {value}.")
