"""The training set, cut into splits of which some images are left out."""

from collections.abc import Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bd.datamodules.splits import stratified_splits

__all__ = ("TrainingSplits",)


class TrainingSplits:
    """Positions in the training set: cut into splits, then filtered, in this order.

    What is excluded does not change the cut, so that the images that remain are in the split that they were in before.

    Args:
        labels: ``(N,)`` int64, of all training images.
        fractions: Share of the images per split.
        seed: Seed of the cut.
        excluded: ``(E,)`` int64, positions in [0, N) that are trained on no more.
        owner: Name of the datamodule, for messages.

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
    ) -> None:
        self.labels = labels
        #: Positions per split, as they were cut.
        self.cut = stratified_splits(labels, fractions, seed)
        self.excluded = excluded
        self._keep = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, excluded, False)
        self._owner = owner
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
        return self.kept(joined) if filtered else joined

    def kept(self, positions: Tensor) -> Tensor:
        """Return those of some positions ``(P,)`` that are not excluded, in their order."""
        return positions[self._keep[positions]]

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
