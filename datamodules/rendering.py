"""From a raw batch to what the model sees: trigger, augmentation, [0, 1]."""

import torch
from torch import Tensor

from lightning_bd.batch import RawBatch, Sample
from lightning_bd.datamodules.augmentation import crop_and_flip
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import Trigger

__all__ = ("render", "to_bytes", "to_float")


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [0, 1], as torchvision's ``ToTensor`` does."""
    return images.to(torch.float32).div_(255)


def to_bytes(images: Tensor) -> Tensor:
    """Round float images in [0, 1] to uint8, as writing an image file does."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def render(raw: RawBatch, poison: Poison | None, padding: int) -> Sample:
    """Carry out a raw batch's draws on its device.

    ``"static"``: trigger, rounding to 8 bits, then augmentation. ``"dynamic"``: augmentation, then the trigger, in
    float. Everything random was drawn by the loader; the same raw batch always gives the same sample.

    Args:
        raw: The batch as it left the loader.
        poison: The attacker's rule; ``None`` if the loader poisons nothing.
        padding: Pixels that crops may move by.

    Returns:
        The finished batch.
    """
    is_poisoned = torch.zeros_like(raw.labels, dtype=torch.bool)
    labels = raw.labels
    if raw.poison_rows is not None and raw.poison_labels is not None:
        is_poisoned = is_poisoned.index_fill(0, raw.poison_rows, True)
        labels = labels.index_copy(0, raw.poison_rows, raw.poison_labels)
    static = raw.context.mode == "static"
    images = raw.images
    if poison is not None and static:
        images = to_bytes(_change(to_float(images), raw, poison.trigger)) if _changes(raw) else images
    if raw.crop_offsets is not None:
        images = crop_and_flip(images, raw.crop_offsets, raw.flips, padding)
    elif raw.flips is not None:
        images = torch.where(raw.flips[:, None, None, None], images.flip(3), images)
    floats = to_float(images)
    if poison is not None and not static:
        floats = _change(floats, raw, poison.trigger)
    return Sample(floats, labels, is_poisoned, raw.labels, raw.indices)


def _changes(raw: RawBatch) -> bool:
    return raw.poison_rows is not None or raw.cover_rows is not None


def _change(images: Tensor, raw: RawBatch, trigger: Trigger) -> Tensor:
    """Put trigger and cover into their rows of ``images``, in place."""
    trigger.to(images.device)
    if raw.poison_rows is not None and len(raw.poison_rows) == len(images):
        return trigger(images)
    if raw.poison_rows is not None and len(raw.poison_rows):
        images.index_copy_(0, raw.poison_rows, trigger(images.index_select(0, raw.poison_rows)))
    if raw.cover_rows is not None and len(raw.cover_rows):
        covered = images.index_select(0, raw.cover_rows)
        # A fixed cover (static) has a seed per image, whatever batch it is in; a dynamic one has a seed per batch.
        parts = covered.split(1) if len(raw.cover_seeds) == len(covered) else (covered,)
        changed = [
            trigger.cover(part, torch.Generator().manual_seed(seed))
            for part, seed in zip(parts, raw.cover_seeds, strict=True)
        ]
        images.index_copy_(0, raw.cover_rows, torch.cat(changed))
    return images
