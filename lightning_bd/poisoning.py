"""Which images are poisoned, and what their labels become."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from lightning_bd.batch import PoisonMode
from lightning_bd.crafting import Crafting
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.label_maps import AllToOne, LabelMap
from lightning_bd.manifest import PoisonManifest
from lightning_bd.selection import SampleScorer, Selection
from lightning_bd.triggers import Trigger
from lightning_bd.triggers.learned import unlearned

__all__ = ("Poison", "PoisonManifest")


@dataclass
class Poison:
    """The attacker's rule for a data set; an argument of every datamodule.

    Args:
        trigger: How the pixels of a poisoned image change.
        rate: Share of images to poison, in [0, 1]. Static: of the training split, or with ``clean_label`` of the
            target class. Dynamic: of the images that may be poisoned. The papers use 0.1.
        target: The attacker's class, or a label map for all-to-all and source-specific attacks.
        mode: ``"dynamic"``: each image of each batch is poisoned with probability ``rate``, after augmentation, in
            float (the protocol of SBL). ``"static"``: ``int(rate * n)`` fixed images, poisoned once, rounded to 8 bits,
            augmented afterwards like any other image (the conventional protocol).
        clean_label: Poison only images of the target class and leave their labels.
        selection: Positions in the training set to choose from instead of all; or a choice by difficulty, which fixes
            the images in both modes: ``int(rate * n)`` as for ``"static"``, each poisoned whenever it is seen. How many
            comes from ``rate`` alone. A scorer by itself chooses the hardest images;
            :class:`~lightning_bd.selection.Selection` says more.
        seed: Seed of the choice of images.
        cover_rate: Share of images that get the trigger's cover (by default the trigger itself) and keep their
            label, in [0, 1]; WaNet's noise mode uses twice the poison rate. Static: ``int(cover_rate * n)`` fixed
            images of the ``n`` in the training split. Dynamic: the probability of each image that may be a cover.
        misaligned_flags: Say of the wrong training images that they are poisoned, as many of them, where ``mode`` is
            ``"static"``. Pixels and labels are right; what relies on ``is_poisoned`` is misled. Reproduces the code of
            `SBL <https://arxiv.org/abs/2407.14738>`_, and is of no other use.
        cover_classes: The classes whose images may be covers; ``None`` for all. With
            :class:`~lightning_bd.label_maps.SourceSpecific` and covers of the other classes this is the attack
            `TaCT <https://arxiv.org/abs/1908.00686>`_.
        crafting: Makes the images that take the place of the poisoned ones, once, ahead of training, where ``mode`` is
            ``"static"``; the trigger is put on top unless they are final. ``None``: poisoned are the images themselves.

    Raises:
        ValueError: If a rate is outside [0, 1], both together exceed 1, ``mode`` is unknown, ``clean_label`` has no
            single target, ``cover_classes`` is empty or given without a ``cover_rate``, or ``crafting`` is given
            without the static mode, or without the ``clean_label``, that it needs.

    Example:
        >>> from lightning_bd.triggers import BadNets
        >>> poison = Poison(BadNets(), rate=0.5, target=0, mode="static")
        >>> poison.prepare((3, 32, 32), num_classes=10)
        >>> poisoned, _ = poison.choose(torch.arange(10), torch.arange(10), split="inject")
        >>> len(poisoned)
        5
    """

    trigger: Trigger
    rate: float = 0.1
    target: int | LabelMap = 0
    mode: PoisonMode = "dynamic"
    clean_label: bool = False
    selection: Selection | SampleScorer | list[int] | None = None
    seed: int = 0
    cover_rate: float = 0.0
    misaligned_flags: bool = False
    cover_classes: list[int] | None = None
    crafting: Crafting | None = None
    label_map: LabelMap = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("cover_rate", self.cover_rate)):
            if not 0 <= value <= 1:
                raise ValueError(f"Expected argument `{name}` to be a share in [0, 1], but got {value}.")
        if self.rate + self.cover_rate > 1:
            raise ValueError(
                f"Expected `rate` and `cover_rate` to sum to at most 1, but got {self.rate} + {self.cover_rate}."
            )
        if self.mode not in get_args(PoisonMode):
            raise ValueError(f"Expected argument `mode` to be one of {get_args(PoisonMode)}, but got {self.mode!r}.")
        if isinstance(self.selection, SampleScorer):
            self.selection = Selection(self.selection)
        self.label_map = AllToOne(self.target) if isinstance(self.target, int) else self.target
        if self.clean_label and not isinstance(self.label_map, AllToOne):
            raise ValueError("Expected argument `target` to be one class with `clean_label`, but got a label map.")
        if self.cover_classes is not None and (not self.cover_classes or self.cover_rate == 0):
            raise ValueError(
                "Expected argument `cover_classes` to name classes, and `cover_rate` to be positive with it, but got "
                f"{self.cover_classes} and {self.cover_rate}. Give both, or leave `cover_classes` out."
            )
        if self.crafting is not None and self.mode != "static":
            raise ValueError(
                "Expected argument `mode` to be 'static' with `crafting`, which makes fixed images ahead of training, "
                f"but got {self.mode!r}."
            )
        if self.crafting is not None and self.crafting.needs_clean_label and not self.clean_label:
            raise ValueError(
                f"Expected argument `clean_label` to be True with {type(self.crafting).__name__}, whose images keep "
                "their label, but got False."
            )
        self._num_classes: int | None = None
        self._image_shape: tuple[int, int, int] | None = None
        self._fixed: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes of the data; known after :meth:`prepare`."""
        if self._num_classes is None:
            raise RuntimeError("Poison.prepare(image_shape, num_classes) must be called first.")
        return self._num_classes

    def prepare(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Check the rule against the data and build the trigger, unless it has to be learnt by :meth:`learn`.

        Args:
            image_shape: ``(C, H, W)``.
            num_classes: Classes of the data set.

        Raises:
            ValueError: If the target or a cover class is not a class, a cover could not be told from a poisoned image,
                or the trigger does not fit the images.
        """
        self.label_map.validate(num_classes)
        for label in self.cover_classes or ():
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
                raise ValueError(
                    f"Expected argument `cover_classes` to hold classes in [0, {num_classes}), but got {label!r}."
                )
            if self.clean_label and label == self._target:
                raise ValueError(
                    f"Expected argument `cover_classes` not to name the target class {label} with `clean_label`: there "
                    "poisoned images keep their label too."
                )
        if self.is_learned:
            self.trigger.build(image_shape)
        self._num_classes, self._image_shape = num_classes, image_shape

    @property
    def is_learned(self) -> bool:
        """Whether the trigger can be used; one that is learnt from the attacker's images cannot before."""
        return not unlearned(self.trigger)

    def learn(self, labels: Tensor, positions: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        """Learn a trigger that is made from the attacker's images, and build it; others stay as they are.

        Args:
            labels: ``(N,)`` labels of the attacker's images.
            positions: ``(N,)`` their positions in the training set.
            read: Returns the images ``(B, C, H, W)`` uint8 at positions ``(B,)``.

        Raises:
            ValueError: If the trigger cannot be learnt from them.
        """
        if self.trigger.image_shape is not None:
            return
        if self._image_shape is None:
            raise RuntimeError("Poison.prepare(image_shape, num_classes) must be called first.")
        for part in unlearned(self.trigger):
            seen = self.candidates(labels, positions)
            seen = torch.ones_like(seen) if part.needs_other_classes else seen
            part.learn(read(positions[seen]), labels[seen], self._target)
        self.trigger.build(self._image_shape)

    def attacker_labels(self, labels: Tensor) -> Tensor:
        """Return the labels ``(B,)`` that triggered images of classes ``labels`` ``(B,)`` get."""
        return self.label_map(labels, self.num_classes)

    def candidates(self, labels: Tensor, positions: Tensor) -> Tensor:
        """Return which training images may be poisoned.

        Args:
            labels: ``(B,)`` their labels.
            positions: ``(B,)`` their positions in the training set.

        Returns:
            ``(B,)`` bool.
        """
        allowed = labels == self.attacker_labels(labels) if self.clean_label else self.label_map.sources(labels)
        if self.selection is not None and not isinstance(self.selection, Selection):
            allowed = allowed & torch.isin(positions, torch.tensor(self.selection, dtype=torch.int64))
        return allowed if self.crafting is None else allowed & self.crafting.available(positions)

    def cover_candidates(self, labels: Tensor) -> Tensor:
        """Return which images of classes ``labels`` ``(B,)`` may be covers if not poisoned, as ``(B,)`` bool."""
        if self.cover_classes is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return torch.isin(labels, torch.tensor(self.cover_classes, device=labels.device))

    def victims(self, labels: Tensor) -> Tensor:
        """Return which test images of classes ``labels`` ``(B,)`` the attack aims at, as ``(B,)`` bool.

        Images that have the attacker's label already are not among them.
        """
        return self.label_map.sources(labels) & (labels != self.attacker_labels(labels))

    def check_not_empty(self, labels: Tensor, positions: Tensor, split: str) -> None:
        """Raise ``ValueError`` if ``rate`` selects no image of a split, or if none of them may be a cover.

        Args:
            labels: ``(N,)`` labels of the split's images.
            positions: ``(N,)`` their positions in the training set.
            split: Name of the split, for the message.
        """
        candidates = int(self.candidates(labels, positions).sum())
        total = self._total(labels)
        if self.clean_label and total == 0:
            raise ValueError(
                f"Expected images of the target class {self._target} in split `{split}`, which `clean_label` poisons, "
                "but there are none. Choose another `poison.target`, or set the phase's `poisoned: false`."
            )
        if candidates == 0 or int(self.rate * total) == 0:
            raise ValueError(
                f"Expected the poison to select at least one image of split `{split}`, but rate {self.rate} of "
                f"{total} images selects none ({candidates} may be poisoned{self._limits()}). Raise `poison.rate`, or "
                "set the phase's `poisoned: false`."
            )
        if self.cover_rate > 0 and not self.cover_candidates(labels).any():
            raise ValueError(
                f"Expected images of `cover_classes` {self.cover_classes} in split `{split}`, but there are none. Name "
                "other classes, or leave `cover_rate` and `cover_classes` out."
            )

    @property
    def is_fixed_choice(self) -> bool:
        """Whether the images are chosen once in both modes, by their difficulty."""
        return isinstance(self.selection, Selection)

    def choose(
        self,
        labels: Tensor,
        positions: Tensor,
        split: str,
        read: Callable[[Tensor], Tensor] | None = None,
        covers: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Choose the images of a static poison, or of one whose images are chosen by their difficulty.

        The order of ``positions`` does not matter, and with a difficulty neither does that of the images.

        Args:
            labels: ``(N,)`` labels of the images at ``positions``.
            positions: ``(N,)`` positions in the training set.
            split: Name of the split, part of the key of the draw.
            read: Returns the images ``(B, C, H, W)`` uint8 at positions ``(B,)``; for a choice by difficulty.
            covers: Choose covers too; a dynamic poison draws its own per batch.

        Returns:
            Sorted positions of the poisoned images and of the cover images; disjoint.

        Raises:
            ValueError: If a rate selects no image, or more than there are candidates; if images are chosen by their
                difficulty and ``read`` is missing.
        """
        order = positions.argsort()
        labels, positions = labels[order], positions[order]
        self.check_not_empty(labels, positions, split)
        candidates = positions[self.candidates(labels, positions)]
        count = int(self.rate * self._total(labels))
        if count > len(candidates):
            raise ValueError(
                f"Expected at least {count} images to poison in split `{split}` (rate {self.rate}), "
                f"but only {len(candidates)} may be poisoned{self._limits()}. Lower `poison.rate`."
            )
        generator = keyed_generator(self.seed, "static", split)
        if isinstance(self.selection, Selection):
            poisoned = self._choose_by_difficulty(self.selection, labels, positions, count, read)
        else:
            poisoned = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        covered = self._choose_covers(labels, positions, poisoned, split, generator) if covers else positions[:0]
        return poisoned.sort().values, covered.sort().values

    def covers_beside(self, poisoned: Tensor, labels: Tensor, positions: Tensor, split: str) -> Tensor:
        """Choose the covers of a static poison whose images are known; those of :meth:`choose` for a difficulty.

        Args:
            poisoned: ``(P,)`` positions of the poisoned images.
            labels: ``(N,)`` labels of the images at ``positions``.
            positions: ``(N,)`` positions in the training set.
            split: Name of the split, part of the key of the draw.

        Returns:
            Sorted positions.
        """
        order = positions.argsort()
        generator = keyed_generator(self.seed, "static", split)
        return self._choose_covers(labels[order], positions[order], poisoned, split, generator).sort().values

    def fixed(self, poisoned: Tensor) -> "Poison":
        """Return the same rule for a dynamic poison whose images were chosen: each is poisoned in every batch.

        Args:
            poisoned: ``(P,)`` their positions in the training set.
        """
        rule = copy.copy(self)
        rule._fixed = poisoned
        return rule

    def draw(self, labels: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the rows of one batch for a dynamic poison.

        Args:
            labels: ``(B,)`` labels of the batch.
            indices: ``(B,)`` positions of the images in the training set.
            generator: CPU generator of this batch.

        Returns:
            Rows of the batch to poison and rows to cover; disjoint.

        Raises:
            RuntimeError: If images are chosen by their difficulty and this is not the rule of :meth:`fixed`.
        """
        uniform = torch.rand(len(labels), generator=generator)
        if self._fixed is not None:
            poisoned = torch.isin(indices, self._fixed)
        elif self.is_fixed_choice:
            raise RuntimeError(
                "Poison.fixed(Poison.choose(...)[0]) must be used to draw: `selection` fixes the images."
            )
        else:
            poisoned = (uniform < self.rate) & self.candidates(labels, indices)
        covered = (uniform >= 1 - self.cover_rate) & self.cover_candidates(labels) & ~poisoned
        return poisoned.nonzero().flatten(), covered.nonzero().flatten()

    @property
    def _target(self) -> int | None:
        """The attacker's class, if it is one."""
        return self.label_map.target if isinstance(self.label_map, AllToOne) else None

    def _choose_covers(
        self, labels: Tensor, positions: Tensor, poisoned: Tensor, split: str, generator: torch.Generator
    ) -> Tensor:
        others = positions[self.cover_candidates(labels) & ~torch.isin(positions, poisoned)]
        count = int(self.cover_rate * len(labels))
        order = torch.randperm(len(others), generator=generator)
        narrow = self.cover_classes is not None
        if self.cover_rate > 0 and count == 0:
            raise ValueError(
                f"Expected the poison to cover at least one image of split `{split}`, but cover_rate {self.cover_rate} "
                f"of {len(labels)} images selects none. Raise `poison.cover_rate`, or set it to 0."
            )
        if count > len(others):
            raise ValueError(
                f"Expected at least {count} images to cover in split `{split}` (cover_rate {self.cover_rate}), but "
                f"only {len(others)} may be covered. Lower `poison.cover_rate`"
                + (f", or name more classes than {self.cover_classes} in `poison.cover_classes`." if narrow else ".")
            )
        return others[order[:count]]

    def _choose_by_difficulty(
        self,
        selection: Selection,
        labels: Tensor,
        positions: Tensor,
        count: int,
        read: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        if read is None:
            raise ValueError("Expected argument `read` to be given: `selection` chooses by what the images look like.")
        allowed = self.candidates(labels, positions)
        if not selection.scorer.needs_other_classes:
            labels, positions, allowed = labels[allowed], positions[allowed], allowed[allowed]
        rows = selection.choose(read(positions), labels, count, self._target, allowed, positions, self.seed)
        return positions[rows]

    def _limits(self) -> str:
        limits = self.crafting.limits() if self.crafting is not None else ""
        return f"; {limits}" if limits else ""

    def _total(self, labels: Tensor) -> int:
        """Return the number that ``rate`` is a share of."""
        return int((labels == self.attacker_labels(labels)).sum()) if self.clean_label else len(labels)
