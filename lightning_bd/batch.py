"""What travels from a loader to the model: raw batches with their draws, and finished samples."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ("AttackBatch", "BatchContext", "PoisonMode", "RawBatch", "Sample")

PoisonMode = Literal["static", "dynamic"]


class Sample(NamedTuple):
    """A finished batch, as the model sees it. Code that works with any batch reads ``batch[:2]``.

    Attributes:
        image: ``(B, C, H, W)`` float32 in [0, 1]; normalisation is the model's first layer.
        label: ``(B,)`` int64, the label to train on or to compare with; the attacker's for a poisoned image.
        is_poisoned: ``(B,)`` bool, true where the trigger was applied and the label follows the label map.
        original_label: ``(B,)`` int64, the label before poisoning.
        index: ``(B,)`` int64, position in the data set that the image comes from.
    """

    image: Tensor
    label: Tensor
    is_poisoned: Tensor
    original_label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class AttackBatch(NamedTuple):
    """A finished training batch for a model that trains its trigger, with what it needs to trigger the images itself.

    The first five fields are those of :class:`Sample`, so that callbacks read it like any batch. Its trigger carries no
    gradient; the model applies it again to the clean images.

    Attributes:
        image: ``(B, C, H, W)`` in [0, 1].
        label: ``(B,)`` int64, the attacker's for a poisoned image.
        is_poisoned: ``(B,)`` bool.
        original_label: ``(B,)`` int64.
        index: ``(B,)`` int64.
        clean_image: ``(B, C, H, W)``, the same images, augmented alike, without trigger and cover.
        poison_rows: ``(P,)`` int64, the rows that get the trigger.
        cover_rows: ``(Q,)`` int64, the rows that are changed and keep their label; disjoint from ``poison_rows``.
    """

    image: Tensor
    label: Tensor
    is_poisoned: Tensor
    original_label: Tensor
    index: Tensor  # type: ignore[assignment]  # as in Sample
    clean_image: Tensor
    poison_rows: Tensor
    cover_rows: Tensor


class BatchContext(NamedTuple):
    """The rule that a loader works under; each of its batches carries it.

    The rule belongs to the loader and not to the datamodule's current state, so that the previous phase's data
    can be replayed while another phase trains.

    Attributes:
        phase: Name of the phase; part of the key of every random draw.
        poison: ``"static"`` or ``"dynamic"`` poisoning at the poison's rate, ``"all"`` for an attack test set
            (every image triggered), ``None`` for clean data.
        mode: How a triggered image is stored: ``"static"`` rounds it to 8 bits, as an image file does.
        train: Whether augmentation applies.
        final: Whether the poisoned images were made ahead, trigger and all.
    """

    phase: str
    poison: Literal["static", "dynamic", "all"] | None = None
    mode: PoisonMode = "dynamic"
    train: bool = False
    final: bool = False


@dataclass  # not frozen: Lightning's true half precision copies a batch field by field
class RawBatch:
    """Stored images and every random decision about them, drawn on the CPU; pixels change later, on the device.

    Attributes:
        images: ``(B, C, H, W)`` uint8.
        labels: ``(B,)`` int64, original labels.
        indices: ``(B,)`` int64.
        context: The loader's rule.
        poison_rows: ``(P,)`` int64, rows of the batch that get trigger and label, or ``None``.
        poison_labels: ``(P,)`` int64, their labels, or ``None``.
        cover_rows: ``(Q,)`` int64, rows that are changed but keep their label, or ``None``.
        cover_seeds: One seed per cover row, or one for all of them; covers may draw noise of their own.
        crop_offsets: ``(B, 2)`` int64, row and column offset into the padded image, or ``None``.
        flips: ``(B,)`` bool, which images are mirrored, or ``None``.
        flags: ``(B,)`` bool, what ``is_poisoned`` says where that is not the truth, or ``None``.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    context: BatchContext
    poison_rows: Tensor | None = None
    poison_labels: Tensor | None = None
    cover_rows: Tensor | None = None
    cover_seeds: tuple[int, ...] = ()
    crop_offsets: Tensor | None = None
    flips: Tensor | None = None
    flags: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RawBatch":
        """Return the batch with its tensors on ``device``; Lightning calls this to transfer a batch."""
        device = torch.device(device)
        if self.images.device == device:
            return self
        if device.type == "cuda" and self.images.device.type == "cpu":
            # Copies from page-locked memory do not stop the host, which goes on to the next batch.
            return self._mapped(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return len(self.labels)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "RawBatch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
        return RawBatch(**values)
