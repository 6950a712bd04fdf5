"""Scores of how hard an image is, and the choice of images to poison by them."""

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_bd.cache import cache_folder
from lightning_bd.description import Description, describe
from lightning_bd.selection.cache import fingerprint, read_scores, write_scores
from lightning_bd.selection.digests import image_digests, keyed_order
from lightning_bd.selection.encoders import Encoder

__all__ = ("Order", "SampleScorer", "Selection")

Order = Literal["hardest", "easiest", "random"]


class SampleScorer(ABC):
    """Gives each image a difficulty; higher is harder.

    A subclass keeps every ``__init__`` argument that changes the scores as an attribute of the same name: they are part
    of the name under which scores are cached. Scores must depend on the images, their labels and the arguments alone,
    never on the global random state.

    Example:
        >>> class Darkness(SampleScorer):
        ...     def score(self, images, labels, target):
        ...         return -images.float().mean(dim=(1, 2, 3))
        >>> Darkness().score(torch.tensor([0, 9]).view(2, 1, 1, 1), torch.zeros(2), 0).tolist()
        [-0.0, -9.0]
    """

    #: Whether the attacker must know the images of the other classes too: a stronger threat model.
    needs_other_classes: ClassVar[bool] = False

    @abstractmethod
    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return the difficulty of each image.

        Args:
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1]; with ``needs_other_classes`` the whole
                training split, else only the images that may be poisoned.
            labels: ``(N,)`` int64, their true labels.
            target: The attacker's class; ``None`` if there is not exactly one.

        Returns:
            ``(N,)`` finite; higher is harder.
        """

    def identity(self) -> Description:
        """Describe what the scores depend on besides the images; an encoder's weights count by their content."""
        described = describe(self)
        assert isinstance(described, dict)
        for name in inspect.signature(type(self)).parameters:
            part = getattr(self, name, None)
            if isinstance(part, Encoder):
                described[name] = part.identity()
        return described


class Selection:
    """Chooses the images to poison by their difficulty, as in `Wicked Oddities <https://arxiv.org/abs/2407.10825>`_.

    An argument of :class:`~lightning_bd.poisoning.Poison`, whose ``rate`` alone says how many. Images are known by
    their pixels: their order in the data set changes nothing, and equal scores are decided by a hash of the image keyed
    with the poison's seed. Scores are computed once and kept as a table ``index, label, score, rank``.

    Args:
        scorer: Gives the difficulty.
        order: ``"hardest"`` (the paper's), ``"easiest"``, or ``"random"``: which end to take.
        window: Choose only from the images whose difficulty lies between these percentiles of those that may be
            poisoned, from 0 (easiest) to 100; ``None``: from all.
        cache_dir: Folder of the tables; ``None``: ``selection`` in the folder that the environment variable
            ``LIGHTNING_BD_CACHE`` names, else in ``~/.cache/lightning_bd``.

    Attributes:
        table: The table that the last choice was made from; ``None`` before, or if it could not be written.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_bd.selection import KNNTypicality, RawPixels
        >>> images = torch.tensor([[9, 9], [8, 9], [9, 8], [0, 9]], dtype=torch.uint8).view(4, 1, 1, 2)
        >>> with TemporaryDirectory() as folder:
        ...     selection = Selection(KNNTypicality(RawPixels(), k=2), cache_dir=folder)
        ...     selection.choose(images, torch.zeros(4, dtype=torch.int64), count=1, target=0).tolist()
        [3]
    """

    def __init__(
        self,
        scorer: SampleScorer,
        order: Order = "hardest",
        window: tuple[float, float] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if order not in get_args(Order):
            raise ValueError(f"Expected argument `order` to be one of {get_args(Order)}, but got {order!r}.")
        if window is not None and not (len(window) == 2 and 0 <= window[0] < window[1] <= 100):
            raise ValueError(
                f"Expected argument `window` to be two increasing percentiles in [0, 100], but got {window}."
            )
        self.scorer = scorer
        self.order: Order = order
        self.window = window
        self.table: Path | None = None
        # Under a name of its own: where scores lie is not part of what a run is.
        self._folder = None if cache_dir is None else Path(cache_dir)

    def choose(
        self,
        images: Tensor,
        labels: Tensor,
        count: int,
        target: int | None,
        candidates: Tensor | None = None,
        indices: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Choose images to poison.

        Args:
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1]: all that the scorer is to see.
            labels: ``(N,)`` int64, their true labels.
            count: How many to choose.
            target: The attacker's class; ``None`` if there is not exactly one.
            candidates: ``(N,)`` bool, which may be chosen; ``None`` for all.
            indices: ``(N,)`` int64, positions in the data set, for the table; ``None``: 0 to ``N - 1``.
            seed: Seed of the random order and of ties.

        Returns:
            ``(count,)`` int64, rows of ``images``, increasing.

        Raises:
            ValueError: If there are fewer images to choose from, or the scorer's result is not one finite number per
                image.
        """
        candidates = torch.ones(len(labels), dtype=torch.bool) if candidates is None else candidates
        indices = torch.arange(len(labels)) if indices is None else indices
        digests = image_digests(images)
        scores = self._scores(images, labels, candidates, indices, digests, target)
        rows: list[int] = candidates.nonzero().flatten().tolist()
        ties = {row: keyed_order(digests[row], f"{seed} ties") for row in rows}
        # From easy to hard.
        rows.sort(key=lambda row: (scores[row], ties[row]))
        if self.window is not None:
            low, high = (math.ceil(percentile * len(rows) / 100) for percentile in self.window)
            rows = rows[low:high]
        if count > len(rows):
            where = "" if self.window is None else f" between the percentiles {self.window[0]} and {self.window[1]}"
            raise ValueError(
                f"Expected at least {count} images to choose from{where}, but there are {len(rows)}. Lower "
                "`poison.rate`" + ("." if self.window is None else ", or widen the selection's `window`.")
            )
        if self.order == "random":
            rows.sort(key=lambda row: keyed_order(digests[row], f"{seed} order"))
        chosen = rows[len(rows) - count :] if self.order == "hardest" else rows[:count]
        return torch.tensor(sorted(chosen), dtype=torch.int64)

    def _scores(
        self,
        images: Tensor,
        labels: Tensor,
        candidates: Tensor,
        indices: Tensor,
        digests: list[bytes],
        target: int | None,
    ) -> list[float]:
        """Return the score of each row; what is no candidate has none (``nan``)."""
        key = fingerprint(self.scorer.identity(), target, digests, labels, indices, candidates)
        path = (self._folder or cache_folder("selection")) / f"{type(self.scorer).__name__}-{key}.csv"
        rows = candidates.nonzero().flatten()
        found = read_scores(path, indices[rows], labels[rows])
        self.table = path
        if found is None:
            found = self._computed(images, labels, digests, target)[rows]
            try:
                write_scores(path, indices[rows], labels[rows], found)
            except OSError as error:
                self.table = None
                warnings.warn(
                    f"The scores could not be kept for the next run: {error}. Give the selection another `cache_dir`.",
                    stacklevel=2,
                )
        scores = torch.full((len(labels),), math.nan, dtype=torch.float64)
        scores[rows] = found
        result: list[float] = scores.tolist()
        return result

    def _computed(self, images: Tensor, labels: Tensor, digests: list[bytes], target: int | None) -> Tensor:
        # In an order of the pixels' own: sums in another order would differ in their last bits.
        order = torch.tensor(sorted(range(len(digests)), key=lambda row: (digests[row], int(labels[row]))))
        name = type(self.scorer).__name__
        found = self.scorer.score(images[order], labels[order], target).detach().double().cpu()
        if found.shape != labels.shape or not bool(found.isfinite().all()):
            bad = f"shape {tuple(found.shape)}" if found.shape != labels.shape else "values that are not finite"
            raise ValueError(f"Expected `{name}` to give one finite score for each of {len(labels)} images, got {bad}.")
        scores = torch.empty_like(found)
        scores[order] = found
        return scores
