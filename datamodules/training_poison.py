"""What the attacker does to the training set, before the defender leaves some of it out."""

from collections.abc import Callable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bd.datamodules.crafted import CraftedImages, crafted
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.datamodules.phase_data import PhaseData
from lightning_bd.datamodules.training_splits import TrainingSplits
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.poisoning import Poison

__all__ = ("TrainingPoison",)


class TrainingPoison:
    """One rule for one training set: which images it changes, chosen once per union of splits.

    What is excluded from the splits changes no choice, so that the images that remain have the poison that they had
    before.

    Args:
        rule: The attacker's rule, prepared.
        splits: Of the training set.
        read: Returns the images ``(B, C, H, W)`` uint8 at positions ``(B,)``.
    """

    def __init__(self, rule: Poison, splits: TrainingSplits, read: Callable[[Tensor], Tensor]) -> None:
        self.rule = rule
        self._splits = splits
        self._read = read
        self._chosen: dict[tuple[tuple[str, ...], bool], tuple[Tensor, Tensor]] = {}
        self._crafted: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def check(self, phase: PhaseData) -> None:
        """Check that the rule can poison a phase.

        Args:
            phase: One that is poisoned.

        Raises:
            MisconfigurationException: If a split does not exist, or the phase is dynamic and images are crafted.
            ValueError: If the rule selects no image.
        """
        crafting = self.rule.crafting
        if phase.poison == "dynamic" and crafting is not None:
            raise MisconfigurationException(
                f"Phase `{phase.name}` is poisoned anew in each batch, but `data.poison.crafting` makes fixed images: "
                "set its `poisoned: static`."
            )
        positions, labels = self._images(phase.splits)
        if crafting is not None:
            crafting.check(len(self._splits.labels))
        self.rule.check_not_empty(labels, positions, _joined(phase.splits))

    def learn_trigger(self, names: tuple[str, ...]) -> None:
        """Let the attacker learn a trigger from the images in some splits, if it has yet to be learnt.

        Args:
            names: Of the splits, joined; empty means all but ``val``.
        """
        positions, labels = self._images(names)
        self.rule.learn(labels, positions, self._read)

    def listed(self, phase: PhaseData) -> Tensor | None:
        """Return which images a phase poisons, for its record.

        Args:
            phase: The phase.

        Returns:
            ``(P,)`` int64, sorted, without those that are excluded; ``None`` if they are drawn anew in each batch.
        """
        static = phase.poison == "static"
        if not static and not (phase.poison and self.rule.is_fixed_choice):
            return None
        return self._splits.kept(self._choice(phase.splits, static)[0])

    def apply(self, loader: BatchLoader, phase: PhaseData, recorded: Tensor | None = None) -> None:
        """Tell a loader which images are changed, and give it those that are crafted.

        Args:
            loader: Of the images in the phase's splits.
            phase: The phase; nothing is done if it draws images anew in each batch, or is clean.
            recorded: ``(P,)`` int64, increasing: the images that a static phase is known to have poisoned; ``None`` to
                choose them.

        Raises:
            ValueError: If images are recorded that are in none of the splits, or that cannot be crafted.
        """
        if phase.poison == "static":
            self._make_static(loader, phase.splits, recorded)
        elif phase.poison == "dynamic" and self.rule.is_fixed_choice:
            loader.poison = self.rule.fixed(self._choice(phase.splits, with_covers=False)[0])

    def _make_static(self, loader: BatchLoader, names: tuple[str, ...], recorded: Tensor | None) -> None:
        chosen, covers = self._choice(names) if recorded is None else self._as_recorded(names, recorded)
        rows = self._mask(chosen)
        loader.static_rows, loader.static_covers = rows, self._mask(covers)
        crafting = self.rule.crafting
        if crafting is not None:
            loader.images = CraftedImages(loader.images, chosen, self._made(names, chosen))
            loader.context = loader.context._replace(final=crafting.includes_trigger)
        if self.rule.misaligned_flags:
            positions, _ = self._images(names)
            order = torch.randperm(len(positions), generator=keyed_generator(self.rule.seed, "misaligned"))
            flags = rows.clone()
            flags[positions] = rows[positions[order]]
            loader.static_flags = flags

    def _choice(self, names: tuple[str, ...], with_covers: bool = True) -> tuple[Tensor, Tensor]:
        """Return the poisoned images and the covers; a dynamic poison draws its own covers."""
        ordered = tuple(sorted(names))
        key = (ordered, with_covers)
        if key not in self._chosen:
            positions, labels = self._images(ordered)
            self._chosen[key] = self.rule.choose(labels, positions, _joined(ordered), self._read, with_covers)
        return self._chosen[key]

    def _as_recorded(self, names: tuple[str, ...], recorded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images that were poisoned, and the covers beside them."""
        ordered = tuple(sorted(names))
        positions, labels = self._images(ordered)
        if not bool(torch.isin(recorded, positions).all()):
            raise ValueError(
                f"Expected the images that the checkpoint says were poisoned to be in split `{_joined(ordered)}`, but "
                "some are not. Use the `data.splits`, `data.split_seed` and phases that it was trained with."
            )
        rule, kept = self.rule, self._splits.kept
        if rule.crafting is not None and not bool(rule.crafting.available(recorded).all()):
            raise ValueError(
                f"Expected all {len(recorded)} images that the checkpoint says were poisoned, but some cannot be made "
                f"({rule.crafting.limits()}). Give those that it was trained with."
            )
        # A record is without what was excluded, and without covers: where the rule agrees with it, the rule knows more.
        if len(self._splits.excluded) or (rule.cover_rate > 0 and not rule.is_fixed_choice):
            chosen, covers = self._choice(ordered)
            if torch.equal(kept(chosen), kept(recorded)):
                return chosen, covers
        return recorded, rule.covers_beside(recorded, labels, positions, _joined(ordered))

    def _made(self, names: tuple[str, ...], chosen: Tensor) -> Tensor:
        ordered = tuple(sorted(names))
        if ordered not in self._crafted or not torch.equal(self._crafted[ordered][0], chosen):
            positions, labels = self._images(ordered)
            self._crafted[ordered] = chosen, crafted(self.rule, chosen, positions, labels, self._read)
        return self._crafted[ordered][1]

    def _images(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Return positions and labels of the images that the attacker has."""
        positions = self._splits.positions(names, filtered=False)
        return positions, self._splits.labels[positions]

    def _mask(self, chosen: Tensor) -> Tensor:
        return torch.zeros(len(self._splits.labels), dtype=torch.bool).index_fill_(0, chosen, True)


def _joined(names: tuple[str, ...]) -> str:
    return "+".join(names) or "all"
