"""The training set in its splits: first the attacker chose images to poison, then the defender left some out."""

from collections.abc import Callable, Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bd.datamodules.crafted import CraftedImages, crafted
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.datamodules.splits import stratified_splits
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.poisoning import Poison

__all__ = ("TrainingSplits",)


class TrainingSplits:
    """Positions in the training set: cut into splits, poisoned, then filtered, in this order.

    What is excluded changes neither the cut nor the choice of a static poison, so that the images that remain are in
    the split, and have the poison, that they had before.

    Args:
        labels: ``(N,)`` int64, of all training images.
        fractions: Share of the images per split.
        seed: Seed of the cut.
        excluded: ``(E,)`` int64, positions in [0, N) that are trained on no more.
        owner: Name of the datamodule, for messages.
        read: Returns the images ``(B, C, H, W)`` uint8 at positions ``(B,)``; for a poison that looks at them.

    Raises:
        ValueError: If the shares are out of their range.
        MisconfigurationException: If a split, or a class in all splits, is excluded as a whole.

    Example:
        >>> splits = TrainingSplits(torch.arange(20) % 2, {"train": 1.0}, 0, torch.tensor([3, 4]), "Data")
        >>> splits.positions(("train",))[:4].tolist(), splits.positions(("train",), filtered=False)[:4].tolist()
        ([0, 1, 2, 5], [0, 1, 2, 3])
    """

    def __init__(
        self,
        labels: Tensor,
        fractions: Mapping[str, float],
        seed: int,
        excluded: Tensor,
        owner: str,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.labels = labels
        #: Positions per split, as they were cut.
        self.cut = stratified_splits(labels, fractions, seed)
        self.excluded = excluded
        self._keep = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, excluded, False)
        self._owner = owner
        self._read = read
        self._static: dict[tuple[tuple[str, ...], bool], tuple[Tensor, Tensor]] = {}
        self._crafted: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._check_remaining()

    def positions(self, names: tuple[str, ...], filtered: bool = True) -> Tensor:
        """Return the sorted positions of the images in some splits.

        Args:
            names: Of the splits, joined; empty means all but ``val``.
            filtered: Without those that are excluded.

        Raises:
            MisconfigurationException: If a split does not exist.
        """
        for name in names:
            if name not in self.cut:
                raise MisconfigurationException(
                    f"{self._owner} has no split `{name}`; it has {', '.join(self.cut)}. "
                    "Add it to `data.splits` or change the phase's `split`."
                )
        chosen = names or tuple(name for name in self.cut if name != "val")
        joined = torch.cat([self.cut[name] for name in chosen]).sort().values
        return joined[self._keep[joined]] if filtered else joined

    def check_poison(self, poison: Poison, names: tuple[str, ...]) -> None:
        """Raise ``ValueError`` if the attacker's rate selects no image of some splits.

        Args:
            poison: The rule.
            names: Of the splits, joined.
        """
        positions = self.positions(names, filtered=False)
        if poison.crafting is not None:
            poison.crafting.check(len(self.labels))
        poison.check_not_empty(self.labels[positions], positions, _joined(names))

    def learn_trigger(self, poison: Poison, names: tuple[str, ...]) -> None:
        """Let the attacker learn a trigger from the images in some splits, if it has yet to be learnt.

        Args:
            poison: The rule.
            names: Of the splits, joined.
        """
        assert self._read is not None
        positions = self.positions(names, filtered=False)
        poison.learn(self.labels[positions], positions, self._read)

    def static_choice(self, poison: Poison, names: tuple[str, ...], with_covers: bool = True) -> tuple[Tensor, Tensor]:
        """Return the images that a poison with a fixed choice changes, chosen once per union of splits.

        Args:
            poison: The rule.
            names: Of the splits, joined.
            with_covers: Choose covers too; a dynamic poison draws its own.

        Returns:
            Sorted positions of the poisoned images and of the cover images, without those that are excluded.
        """
        poisoned, covers = self._chosen(poison, names, with_covers)
        return poisoned[self._keep[poisoned]], covers[self._keep[covers]]

    def make_static(
        self, loader: BatchLoader, poison: Poison, names: tuple[str, ...], recorded: Tensor | None = None
    ) -> None:
        """Tell a loader which images a static poison changes, and give it those that are crafted.

        Args:
            loader: Of the images in these splits.
            poison: The rule.
            names: Of the splits, joined.
            recorded: ``(P,)`` int64, increasing: positions of the images that were poisoned, where that is known;
                ``None`` to choose them.

        Raises:
            ValueError: If images are recorded that are in none of the splits, or that cannot be crafted.
        """
        if recorded is None:
            chosen, covers = self._chosen(poison, names, with_covers=True)
        else:
            chosen, covers = self._as_recorded(poison, names, recorded)
        rows, covers = self._mask(chosen), self._mask(covers)
        loader.static_rows, loader.static_covers = rows, covers
        if poison.crafting is not None:
            loader.images = CraftedImages(loader.images, chosen, self._made(poison, names, chosen))
            loader.context = loader.context._replace(final=poison.crafting.includes_trigger)
        if poison.misaligned_flags:
            positions = self.positions(names, filtered=False)
            order = torch.randperm(len(positions), generator=keyed_generator(poison.seed, "misaligned"))
            flags = rows.clone()
            flags[positions] = rows[positions[order]]
            loader.static_flags = flags

    def make_fixed(self, loader: BatchLoader, poison: Poison, names: tuple[str, ...]) -> None:
        """Tell a loader which images a dynamic poison changes that chooses them by their difficulty.

        Args:
            loader: Of the images in these splits.
            poison: The rule.
            names: Of the splits, joined.
        """
        loader.poison = poison.fixed(self._chosen(poison, names, with_covers=False)[0])

    def forget_poison(self) -> None:
        """Choose anew when asked next: the poison is another one."""
        self._static.clear()
        self._crafted.clear()

    def _chosen(self, poison: Poison, names: tuple[str, ...], with_covers: bool) -> tuple[Tensor, Tensor]:
        ordered = tuple(sorted(names))
        key = (ordered, with_covers)
        if key not in self._static:
            positions = self.positions(ordered, filtered=False)
            labels, name = self.labels[positions], _joined(ordered)
            self._static[key] = poison.choose(labels, positions, name, self._read, with_covers)
        return self._static[key]

    def _as_recorded(self, poison: Poison, names: tuple[str, ...], recorded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images that were poisoned, and the covers beside them."""
        ordered = tuple(sorted(names))
        positions = self.positions(ordered, filtered=False)
        if not bool(torch.isin(recorded, positions).all()):
            raise ValueError(
                f"Expected the images that the checkpoint says were poisoned to be in split `{_joined(ordered)}`, but "
                "some are not. Use the `data.splits`, `data.split_seed` and phases that it was trained with."
            )
        if poison.crafting is not None and not bool(poison.crafting.available(recorded).all()):
            raise ValueError(
                f"Expected all {len(recorded)} images that the checkpoint says were poisoned, but some cannot be made "
                f"({poison.crafting.limits()}). Give those that it was trained with."
            )
        # A record is without what was excluded, and without covers: where the rule agrees with it, the rule knows more.
        if len(self.excluded) or (poison.cover_rate > 0 and not poison.is_fixed_choice):
            chosen, covers = self._chosen(poison, ordered, with_covers=True)
            if torch.equal(chosen[self._keep[chosen]], recorded[self._keep[recorded]]):
                return chosen, covers
        labels = self.labels[positions]
        return recorded, poison.covers_beside(recorded, labels, positions, _joined(ordered))

    def _made(self, poison: Poison, names: tuple[str, ...], chosen: Tensor) -> Tensor:
        ordered = tuple(sorted(names))
        if ordered not in self._crafted or not torch.equal(self._crafted[ordered][0], chosen):
            assert self._read is not None
            positions = self.positions(ordered, filtered=False)
            self._crafted[ordered] = chosen, crafted(poison, chosen, positions, self.labels[positions], self._read)
        return self._crafted[ordered][1]

    def _mask(self, chosen: Tensor) -> Tensor:
        return torch.zeros(len(self.labels), dtype=torch.bool).index_fill_(0, chosen, True)

    def _check_remaining(self) -> None:
        for name, positions in self.cut.items():
            if not self._keep[positions].any():
                raise MisconfigurationException(
                    f"Leave some images of split `{name}` out of `exclude`: it names all {len(positions)} of them."
                )
        cut = torch.cat(list(self.cut.values()))
        before, after = (set(self.labels[part].tolist()) for part in (cut, cut[self._keep[cut]]))
        missing = sorted(before - after)
        if missing:
            raise MisconfigurationException(
                f"Leave some images of class {missing[0]} out of `exclude`: it names all of them that are in a split, "
                f"and the model is to learn {len(before)} classes."
            )


def _joined(names: tuple[str, ...]) -> str:
    return "+".join(names) or "all"
