"""From a raw batch to what the model sees: trigger, augmentation, [0, 1]."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_bd.batch import RawBatch, Sample
from lightning_bd.datamodules.augmentation import crop_and_flip, mirror
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import Trigger

__all__ = ("as_precision", "render", "to_bytes", "to_float")


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [0, 1], as torchvision's ``ToTensor`` does."""
    return torch.div(images, 255)


def to_bytes(images: Tensor) -> Tensor:
    """Round float images in [0, 1] to uint8, as writing an image file does."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def as_precision(images: Tensor, trainer: Trainer | None) -> Tensor:
    """Convert images for a Trainer whose precision is ``16-true``, ``bf16-true`` or ``64-true``.

    Lightning converts a batch before it is transferred, when ours is still uint8.
    """
    if trainer is None or not str(trainer.precision).endswith("-true") or trainer.precision == "32-true":
        return images
    converted: Tensor = trainer.precision_plugin.convert_input(images)
    return converted


@torch.no_grad()
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
        images = _change(images, raw, poison.trigger)
    if raw.crop_offsets is not None:
        images = crop_and_flip(images, raw.crop_offsets, raw.flips, padding)
    elif raw.flips is not None:
        images = mirror(images, raw.flips)
    floats = to_float(images)
    if poison is not None and not static:
        floats = _change(floats, raw, poison.trigger)
    return Sample(floats, labels, is_poisoned if raw.flags is None else raw.flags, raw.labels, raw.indices)


def _change(images: Tensor, raw: RawBatch, trigger: Trigger) -> Tensor:
    """Put trigger and cover into their rows; uint8 images stay uint8, and the stored batch as it is."""
    # Parameters that were moved in inference mode could not be trained any more.
    with torch.inference_mode(False):
        trigger.to(images.device)
    rows, parts = [], []
    if raw.poison_rows is not None and len(raw.poison_rows) and not raw.context.final:
        clean = _as_float(images.index_select(0, raw.poison_rows))
        rows.append(raw.poison_rows)
        parts.append(_stored(trigger.attack(clean) if raw.context.poison == "all" else trigger(clean), images.dtype))
    if raw.cover_rows is not None and len(raw.cover_rows):
        covered = _as_float(images.index_select(0, raw.cover_rows))
        # A fixed cover (static) has a seed per image, whatever batch it is in; a dynamic one has a seed per batch.
        chunks = torch.split(covered, 1) if raw.context.mode == "static" else (covered,)
        rows.append(raw.cover_rows)
        parts += [
            _stored(trigger.cover(chunk, torch.Generator().manual_seed(seed)), images.dtype)
            for chunk, seed in zip(chunks, raw.cover_seeds, strict=True)
        ]
    if not rows:
        return images
    changed = images.clone() if images is raw.images else images
    return changed.index_copy_(0, torch.cat(rows), torch.cat(parts))


def _as_float(images: Tensor) -> Tensor:
    return to_float(images) if images.dtype == torch.uint8 else images


def _stored(images: Tensor, dtype: torch.dtype) -> Tensor:
    return to_bytes(images) if dtype == torch.uint8 else images
