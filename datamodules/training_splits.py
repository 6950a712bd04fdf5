"""The training set in its splits: first the attacker chose images to poison, then the defender left some out."""

from collections.abc import Callable, Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

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
        self._static: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
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
        poison.check_not_empty(self.labels[positions], positions, _joined(names))

    def static_choice(self, poison: Poison, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Return the images that a poison with a fixed choice changes, chosen once per union of splits.

        Args:
            poison: The rule.
            names: Of the splits, joined.

        Returns:
            Sorted positions of the poisoned images and of the cover images, without those that are excluded.
        """
        poisoned, covers = self._chosen(poison, names)
        return poisoned[self._keep[poisoned]], covers[self._keep[covers]]

    def make_static(self, loader: BatchLoader, poison: Poison, names: tuple[str, ...]) -> None:
        """Tell a loader which images a static poison changes.

        Args:
            loader: Of the images in these splits.
            poison: The rule.
            names: Of the splits, joined.
        """
        rows, covers = (self._mask(chosen) for chosen in self._chosen(poison, names))
        loader.static_rows, loader.static_covers = rows, covers
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
        loader.poison = poison.fixed(self._chosen(poison, names)[0])

    def forget_poison(self) -> None:
        """Choose anew when asked next: the poison is another one."""
        self._static.clear()

    def _chosen(self, poison: Poison, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        key = tuple(sorted(names))
        if key not in self._static:
            positions = self.positions(key, filtered=False)
            self._static[key] = poison.choose(self.labels[positions], positions, _joined(key), self._read)
        return self._static[key]

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
