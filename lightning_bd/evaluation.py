"""Evaluating a checkpoint: its own trigger, and predictions as a table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bd.checkpointing import RECORD_KEY
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.poisoning import Poison, PoisonManifest

__all__ = ("use_manifest_of", "write_predictions")


def use_manifest_of(
    checkpoint: Mapping[str, Any], path: Path, datamodule: ImageDataModule, *, override: bool = False
) -> None:
    """Make a datamodule evaluate with the trigger that a checkpoint was trained with.

    A checkpoint without a manifest changes nothing.

    Args:
        checkpoint: The checkpoint.
        path: Where it came from, for messages.
        datamodule: The data; its poison is replaced.
        override: Keep the config's trigger where it differs.

    Raises:
        MisconfigurationException: If config and checkpoint name different triggers.
        ValueError: If the manifest is broken or does not fit the images.
    """
    record = checkpoint.get(RECORD_KEY) or {}
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}: expected the record with the poison manifest to be a mapping, but got {record!r:.80}."
        )
    if not record.get("manifest"):
        return
    manifest = PoisonManifest.from_plain(record["manifest"], record.get("tensors", {}))
    # Before anything is built for it: a shape in a hostile file may be of any size.
    if manifest.image_shape != datamodule.image_shape:
        raise ValueError(
            f"The trigger of {path} is for images of shape {manifest.image_shape}, but "
            f"{type(datamodule).__name__} has {datamodule.image_shape}."
        )
    config = datamodule.manifest()
    if config is not None:
        found = manifest.differences(config)
        if found and not override:
            raise MisconfigurationException(
                f"The trigger of {path} is not the config's:\n  " + "\n  ".join(found) + "\n(checkpoint against "
                "config). Use the config that it was trained with, leave `data.poison` out to take the checkpoint's "
                "trigger, or evaluate with the config's by `--override-trigger`."
            )
        if found:
            return
    known = type(datamodule.poison.trigger) if datamodule.poison is not None else None
    datamodule.replace_poison(
        Poison(
            manifest.build_trigger(known),
            rate=manifest.rate,
            target=manifest.build_label_map(),
            mode="static" if manifest.mode == "static" else "dynamic",
            clean_label=manifest.clean_label,
            cover_rate=manifest.cover_rate,
            seed=manifest.seed,
        )
    )


def write_predictions(batches: Sequence[tuple[Tensor, ...]], path: Path) -> None:
    """Write one row per image: index in the data set, label, prediction, confidence.

    Args:
        batches: Probabilities ``(B, K)``, labels ``(B,)`` and indices ``(B,)`` per batch; without indices rows are
            numbered.
        path: The CSV file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "prediction", "confidence"])
        count = 0
        for probabilities, labels, *rest in batches:
            confidences, predictions = probabilities.max(dim=1)
            indices = rest[0].tolist() if rest else range(count, count + len(labels))
            rows = zip(indices, labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
            writer.writerows([*row, f"{confidence:.6f}"] for *row, confidence in rows)
            count += len(labels)
