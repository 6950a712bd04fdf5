"""Loaders that draw every random decision on the CPU, keyed by what it is for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bd.batch import BatchContext, RawBatch
from lightning_bd.datamodules.images import ImageSet, TensorImages
from lightning_bd.functional.draws import keyed_generator, keyed_seed
from lightning_bd.poisoning import Poison

__all__ = ("Augment", "BatchLoader", "Place", "place_of")

Augment = Literal["none", "crop", "crop_flip"]


@dataclass(frozen=True)
class Place:
    """Where a process is in a run: its epoch, and its rank among ``world_size`` processes."""

    epoch: int = 0
    rank: int = 0
    world_size: int = 1


def place_of(trainer: Trainer | None) -> Place:
    """Return where a Trainer's process is now; the first place without one."""
    return Place() if trainer is None else Place(trainer.current_epoch, trainer.global_rank, trainer.world_size)


class BatchLoader:
    """Yields :class:`~lightning_bd.batch.RawBatch` objects of one split under one rule.

    Not a ``DataLoader``, so Lightning neither shuffles it nor replaces its sampler: order, crops, mirrors and poison
    are a function of (seed, phase, epoch, batch, rank) alone, in memory or from files, with or without workers. The
    epoch is read when the first batch is asked for, not when the iterator is made: on a resume Lightning makes the
    iterator before it knows the epoch.

    Args:
        images: The images.
        positions: ``(N,)`` which of them, in a fixed order.
        context: The rule; travels with each batch.
        batch_size: Images per batch and process.
        seed: Seed of order, augmentation and dynamic poison.
        poison: The attacker's rule, for a context that poisons.
        augment: Augmentation of a training context.
        padding: Pixels that a crop may move by.
        place: Returns the current epoch, rank and world size.
        static_rows: ``(M,)`` bool for the ``M`` images: poisoned, for static contexts.
        static_covers: ``(M,)`` bool: covers, for static contexts.
        num_workers: Processes that decode files; ignored for images in memory.
        static_flags: ``(M,)`` bool: what ``is_poisoned`` says instead of ``static_rows``.

    Raises:
        ValueError: If there are fewer images than processes.
    """

    def __init__(
        self,
        images: ImageSet,
        positions: Tensor,
        context: BatchContext,
        *,
        batch_size: int,
        seed: int = 0,
        poison: Poison | None = None,
        augment: Augment = "none",
        padding: int = 4,
        place: Callable[[], Place] = Place,
        static_rows: Tensor | None = None,
        static_covers: Tensor | None = None,
        num_workers: int = 0,
        static_flags: Tensor | None = None,
    ) -> None:
        self.images = images
        self.positions = positions
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.poison = poison
        self.augment: Augment = augment if context.train else "none"
        self.padding = padding
        self.place = place
        self.static_rows = static_rows
        self.static_covers = static_covers
        self.static_flags = static_flags
        self.num_workers = 0 if isinstance(images, TensorImages) else num_workers
        world_size = place().world_size
        if len(positions) < world_size:
            raise ValueError(
                f"Expected at least one image per process, but phase `{context.phase}` has {len(positions)} images "
                f"for {world_size} processes."
            )

    def __len__(self) -> int:
        world_size = self.place().world_size
        share = len(self.positions) // world_size
        if not self.context.train:
            # No process may be left with an empty batch, so the smallest share bounds the number: with batches of one
            # image, a process that has one image more gets one batch of two.
            return min(math.ceil(math.ceil(len(self.positions) / world_size) / self.batch_size), share)
        full, rest = divmod(share, self.batch_size)
        # BatchNorm cannot train on one image: a last batch of a single image is left out of its epoch.
        leave_out = rest == 1 and full > 0
        return full + (rest > 0 and not leave_out)

    def __iter__(self) -> Iterator[RawBatch]:
        place = self.place()
        batches = self._batches(place)
        for number, (positions, images) in enumerate(zip(batches, self._read(batches), strict=True)):
            yield self._draw(positions, images, number, place)

    def _batches(self, place: Place) -> list[Tensor]:
        """Cut this process' share of the epoch into batches; all processes get equally many."""
        if not self.context.train:
            # Equal numbers of batches keep processes in step; sizes differ by at most one, no image counts twice.
            return list(self.positions[place.rank :: place.world_size].tensor_split(len(self)))
        order = torch.randperm(
            len(self.positions), generator=keyed_generator(self.seed, self.context.phase, "order", place.epoch)
        )
        share = len(order) // place.world_size
        mine = self.positions[order[: share * place.world_size][place.rank :: place.world_size]]
        return list(torch.split(mine, self.batch_size))[: len(self)]

    def _read(self, batches: list[Tensor]) -> Iterator[Tensor]:
        if self.num_workers == 0:
            return (self.images.read(positions) for positions in batches)
        loader: DataLoader[Tensor] = DataLoader(
            _BatchReader(self.images, batches),
            batch_size=None,
            num_workers=self.num_workers,
            # The workers' base seed must not come from the global random state.
            generator=keyed_generator(self.seed, "workers"),
        )
        return iter(loader)

    def _draw(self, positions: Tensor, images: Tensor, number: int, place: Place) -> RawBatch:
        context = self.context
        labels = self.images.labels[positions]
        key = (self.seed, context.phase, place.epoch, number, place.rank)
        rows = covers = None
        cover_seeds: tuple[int, ...] = ()
        if context.poison == "all":
            rows = torch.arange(len(labels))
        elif context.poison == "static" and self.static_rows is not None:
            rows = self.static_rows[positions].nonzero().flatten()
            if self.static_covers is not None:
                covers = self.static_covers[positions].nonzero().flatten()
                cover_seeds = tuple(keyed_seed(self.seed, "cover", i) for i in positions[covers].tolist())
        elif context.poison == "dynamic" and self.poison is not None:
            rows, covers = self.poison.draw(labels, positions, keyed_generator(*key, "poison"))
            cover_seeds = (keyed_seed(*key, "cover"),) if len(covers) else ()
        poison_labels = None
        if rows is not None and self.poison is not None:
            poison_labels = self.poison.attacker_labels(labels[rows])
        offsets = flips = None
        if self.augment != "none":
            generator = keyed_generator(*key, "augment")
            offsets = torch.randint(0, 2 * self.padding + 1, (len(labels), 2), generator=generator)
            if self.augment == "crop_flip":
                flips = torch.rand(len(labels), generator=generator) < 0.5
        return RawBatch(
            images,
            labels,
            positions,
            context,
            poison_rows=rows,
            poison_labels=poison_labels,
            cover_rows=covers if covers is not None and len(covers) else None,
            cover_seeds=cover_seeds,
            crop_offsets=offsets,
            flips=flips,
            flags=None if self.static_flags is None else self.static_flags[positions],
        )


class _BatchReader(Dataset[Tensor]):
    """Item ``i`` is the images of batch ``i``: what a worker process decodes."""

    def __init__(self, images: ImageSet, batches: list[Tensor]) -> None:
        self.images = images
        self.batches = [np.asarray(batch) for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Tensor:
        return self.images.read(torch.from_numpy(self.batches[number]))
