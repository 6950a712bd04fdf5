"""A small memory of the previous task."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_bd.callbacks.continual.reference import ReferenceKind, reference_batches
from lightning_bd.functional.draws import keyed_generator, keyed_seed

__all__ = ("BufferBatch", "ReplayBuffer", "filled_buffer", "from_all_processes", "merge_buffers")

_T = TypeVar("_T")

# What arithmetic in half precision, or a blend of images, may leave [0, 1] by; it vanishes in the rounding to 8 bits.
_TOLERANCE = 1e-3


class BufferBatch(NamedTuple):
    """Samples of a :class:`ReplayBuffer`.

    Attributes:
        images: ``(B, ...)`` float32 in [0, 1].
        labels: ``(B,)`` int64.
        logits: ``(B, K)`` float32, ``None`` if the buffer was filled without.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor | None


class ReplayBuffer:
    """Keep a uniform random sample of all images that were ever offered, without knowing how many will come.

    Reservoir sampling, Algorithm R of `Vitter, 1985 <https://doi.org/10.1145/3147.3165>`_: sample number ``n`` enters
    with probability ``capacity / n`` and takes the place of a random one. Images are held as uint8 on the device of
    the first batch. What is drawn depends on the seed and on how the samples came in batches, and on nothing else; so
    a buffer that was loaded from a checkpoint goes on as the one that was saved.

    Args:
        capacity: Samples that are held, positive; 512 in the code of `Flatness-aware Sequential Learning
            <https://arxiv.org/abs/2407.14738>`_.
        seed: Seed of the draws.

    Raises:
        ValueError: If ``capacity`` is out of range.

    Example:
        >>> buffer = ReplayBuffer(capacity=2)
        >>> buffer.insert(torch.linspace(0, 1, 6).view(6, 1, 1, 1), torch.arange(6))
        >>> len(buffer), buffer.seen
        (2, 6)
        >>> batch = buffer.sample(2, torch.Generator().manual_seed(0))
        >>> torch.equal(batch.images.flatten() * 5, batch.labels.float())
        True
    """

    def __init__(self, capacity: int = 512, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"Expected argument `capacity` to be a positive integer, but got {capacity}.")
        self.capacity = capacity
        self.seed = seed
        self.seen = 0
        self._storage: BufferBatch | None = None

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    @torch.no_grad()
    def insert(self, images: Tensor, labels: Tensor, logits: Tensor | None = None) -> None:
        """Offer a batch.

        Args:
            images: ``(B, ...)`` floating point in [0, 1]; rounded to 8 bits.
            labels: ``(B,)`` integers.
            logits: ``(B, K)`` floating point; with all batches or with none.

        Raises:
            ValueError: If a tensor is unlike those before it, or the images are not in [0, 1].
        """
        if len(images) == 0:
            return
        self._check(images, labels, logits)
        if self._storage is None:
            self._storage = BufferBatch(
                torch.empty((self.capacity, *images.shape[1:]), dtype=torch.uint8, device=images.device),
                torch.empty(self.capacity, dtype=torch.int64, device=images.device),
                None if logits is None else torch.empty((self.capacity, *logits.shape[1:]), device=images.device),
            )
        slots, rows = self._draw_slots(len(images))
        self.seen += len(images)
        held, device = self._storage, self._storage.images.device
        rows, slots = rows.to(images.device), slots.to(device)
        held.images[slots] = images[rows].float().mul(255).round().clamp(0, 255).to(device, torch.uint8)
        held.labels[slots] = labels[rows].to(device, torch.int64)
        if held.logits is not None and logits is not None:
            held.logits[slots] = logits[rows].to(device, torch.float32)

    def sample(self, batch_size: int, generator: torch.Generator) -> BufferBatch:
        """Draw a batch without replacement.

        Args:
            batch_size: Samples to draw; all if it holds fewer.
            generator: Generator of the CPU.

        Raises:
            ValueError: If the buffer is empty.
        """
        if self._storage is None:
            raise ValueError("Expected a buffer that holds samples, but got an empty one. Call `insert` first.")
        rows = torch.randperm(len(self), generator=generator)[:batch_size].to(self._storage.images.device)
        images, labels, logits = self._storage
        return BufferBatch(images[rows].float().div(255), labels[rows], None if logits is None else logits[rows])

    def to(self, device: torch.device | str) -> "ReplayBuffer":
        """Move the samples to a device and return the buffer."""
        if self._storage is not None:
            images, labels, logits = self._storage
            moved = None if logits is None else logits.to(device)
            self._storage = BufferBatch(images.to(device), labels.to(device), moved)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the samples, uint8 images, and how many were offered; tensors and integers."""
        state: dict[str, Any] = {"capacity": self.capacity, "seed": self.seed, "seen": self.seen}
        if self._storage is not None:
            # Copies: a view would be saved with the rows that hold nothing yet, and change with the next batch.
            state.update({k: v[: len(self)].clone() for k, v in self._storage._asdict().items() if v is not None})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold what another buffer held when :meth:`state_dict` was called, and draw from then on as it does.

        Raises:
            ValueError: If that buffer had another capacity.
        """
        if state_dict["capacity"] != self.capacity:
            raise ValueError(
                f"Expected argument `capacity` to be {state_dict['capacity']}, as when the state was saved, but got"
                f" {self.capacity}."
            )
        self.seed, self.seen, self._storage = state_dict["seed"], state_dict["seen"], None
        if self.seen:
            parts = (state_dict.get(name) for name in BufferBatch._fields)
            images, labels, logits = (None if p is None else _with_room(p, self.capacity) for p in parts)
            assert images is not None
            assert labels is not None
            self._storage = BufferBatch(images, labels, logits)

    def _draw_slots(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the places that the next ``count`` samples change, each once, and the row that ends up in it."""
        numbers = torch.arange(self.seen, self.seen + count)
        # A remainder of 63 random bits is uniform but for one part in 2^63 / n.
        bits = torch.empty(count, dtype=torch.int64).random_(
            generator=keyed_generator(self.seed, "reservoir", self.seen)
        )
        slots = torch.where(numbers < self.capacity, numbers, bits % (numbers + 1))
        rows = (slots < self.capacity).nonzero().flatten()
        slots, order = slots[rows].sort(stable=True)
        # Of several rows for one place the last one stays, as if they had come one by one.
        is_last = torch.ones(len(slots), dtype=torch.bool)
        is_last[:-1] = slots[1:] != slots[:-1]
        return slots[is_last], rows[order][is_last]

    def _check(self, images: Tensor, labels: Tensor, logits: Tensor | None) -> None:
        if not images.is_floating_point():
            raise ValueError(f"Expected argument `images` to be floating point in [0, 1], but got {images.dtype}.")
        lowest, highest = torch.stack(images.aminmax()).tolist()
        if not (lowest >= -_TOLERANCE and highest <= 1 + _TOLERANCE):
            raise ValueError(
                f"Expected argument `images` to be in [0, 1], but got values from {lowest:g} to {highest:g}. Images are"
                " held with 8 bits: move the normalisation out of the data and into the model, as its first layer."
            )
        if labels.is_floating_point():
            raise ValueError(f"Expected argument `labels` to hold the numbers of classes, but got {labels.dtype}.")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"Expected argument `labels` to have shape ({len(images)},), one for each image, but got"
                f" {tuple(labels.shape)}."
            )
        if self._storage is None:
            return
        for name, now, held in (("images", images, self._storage.images), ("logits", logits, self._storage.logits)):
            shape, before = (None if part is None else tuple(part.shape[1:]) for part in (now, held))
            if shape != before:
                raise ValueError(
                    f"Expected argument `{name}` to have shape {before} for each sample, as before, but got {shape}."
                )


def filled_buffer(
    trainer: Trainer,
    pl_module: LightningModule,
    name: str,
    *,
    dataloader: Iterable[Any] | None = None,
    reference: ReferenceKind = "as_trained",
    capacity: int = 512,
    seed: int = 0,
    logits: Callable[[Tensor], Tensor | None] | None = None,
) -> ReplayBuffer:
    """Offer one epoch of the previous task to a new buffer; under DDP all processes hold the same samples.

    Args:
        trainer: The trainer that is fitting.
        pl_module: The module that is fitted.
        name: Which callback fills the buffer, for messages.
        dataloader: See :func:`~lightning_bd.callbacks.continual.reference.reference_batches`.
        reference: Which of the datamodule's batches.
        capacity: Samples that the buffer holds, all processes together.
        seed: Seed of the buffer.
        logits: Maps images to the logits that are stored with them, or to None; None stores none.

    Raises:
        MisconfigurationException: If there is no data.
    """
    rank = trainer.global_rank
    buffer = ReplayBuffer(capacity, keyed_seed(seed, "process", rank) if rank else seed)
    with isolate_rng():
        for images, labels in reference_batches(trainer, pl_module, dataloader, name, reference):
            buffer.insert(images, labels, None if logits is None else logits(images))
    if trainer.world_size > 1:
        buffer = merge_buffers(from_all_processes(trainer, buffer.to("cpu")), seed)
    if buffer.seen == 0:
        raise MisconfigurationException(
            f"`{name}` got no sample of the previous task. Pass a `dataloader` that is not empty (nor exhausted, if it"
            " is an iterator)."
        )
    return buffer.to(pl_module.device)


def merge_buffers(buffers: Sequence[ReplayBuffer], seed: int = 0) -> ReplayBuffer:
    """Make one uniform sample of all that was offered to several buffers.

    Each gives as many samples as it would have in a sample of the union, so that one that saw more gives more.

    Args:
        buffers: Buffers of one capacity, at least one; not changed. What was offered to them is disjoint.
        seed: Seed of the draws, and of the buffer that is returned.

    Example:
        >>> buffers = [ReplayBuffer(capacity=4) for _ in range(2)]
        >>> for buffer in buffers:
        ...     buffer.insert(torch.rand(10, 1, 2, 2), torch.arange(10))
        >>> merged = merge_buffers(buffers)
        >>> len(merged), merged.seen
        (4, 20)
    """
    merged = ReplayBuffer(buffers[0].capacity, seed)
    generator = keyed_generator(seed, "merge")
    origins = torch.arange(len(buffers)).repeat_interleave(torch.tensor([buffer.seen for buffer in buffers]))
    chosen = origins[torch.randperm(len(origins), generator=generator)[: merged.capacity]]
    for buffer, count in zip(buffers, chosen.bincount(minlength=len(buffers)).tolist(), strict=True):
        if count:
            merged.insert(*buffer.sample(count, generator))
    merged.seen = len(origins)
    return merged


def from_all_processes(trainer: Trainer, value: _T) -> list[_T]:
    """Return what each process passed, in the order of their ranks.

    Args:
        trainer: The trainer that is fitting.
        value: Anything that can be pickled, on the CPU.
    """
    if trainer.world_size == 1:
        return [value]
    values: list[_T] = [value] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _with_room(rows: Tensor, capacity: int) -> Tensor:
    return torch.cat([rows, rows.new_empty((capacity - len(rows), *rows.shape[1:]))])
