"""Evaluating a checkpoint: its own trigger, and predictions as a table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_bd.checkpointing import RECORD_KEY, TRIGGER_KEY
from lightning_bd.crafting import AbsentCrafting, Crafting
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.datamodules.loader import Place
from lightning_bd.description import describe, differences
from lightning_bd.poisoning import Poison, PoisonManifest
from lightning_bd.triggers import Trigger

__all__ = ("evaluation_batches", "use_manifest_of", "use_trained_trigger_of", "write_predictions")


def use_manifest_of(
    checkpoint: Mapping[str, Any], path: Path, datamodule: ImageDataModule, *, override: bool = False
) -> PoisonManifest | None:
    """Make a datamodule evaluate with the trigger that a checkpoint was trained with.

    A checkpoint without a manifest changes nothing.

    Args:
        checkpoint: The checkpoint.
        path: Where it came from, for messages.
        datamodule: The data; its poison is replaced.
        override: Keep the config's trigger where it differs.

    Returns:
        The checkpoint's manifest, if it has one.

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
        return None
    manifest = PoisonManifest.from_plain(record["manifest"], record.get("tensors", {}))
    # Before anything is built for it: a shape in a hostile file may be of any size.
    if manifest.image_shape != datamodule.image_shape:
        raise ValueError(
            f"The trigger of {path} is for images of shape {manifest.image_shape}, but "
            f"{type(datamodule).__name__} has {datamodule.image_shape}."
        )
    config = datamodule.manifest(learn=False)
    if config is not None:
        assert datamodule.poison is not None
        # Weights that a model trains are what no config says.
        is_fixed = datamodule.poison.is_learned and not datamodule.poison.trigger.is_trained
        found = manifest.differences(config, pixels=is_fixed)
        if manifest.crafting is not None and config.crafting is not None:
            mine, theirs = ({**each.crafting, "attack_images": None} for each in (manifest, config) if each.crafting)
            found += differences(describe(mine), describe(theirs), "crafting")
        if found and not override:
            raise MisconfigurationException(
                f"The trigger of {path} is not the config's:\n  " + "\n  ".join(found) + "\n(checkpoint against "
                "config). Use the config that it was trained with, leave `data.poison` out to take the checkpoint's "
                "trigger, or evaluate with the config's by `--override-trigger`."
            )
        # What has yet to be learnt may differ by what only learning needs, which a manifest does not say.
        if found or (override and not datamodule.poison.is_learned):
            return manifest
    elif (manifest.crafting or {}).get("attack_images"):
        raise MisconfigurationException(
            f"The attack of {path} is test images that another program made, which a checkpoint does not hold. Give "
            "`data.poison` with the `crafting` that it was trained with, and the `test_folder` where they lie."
        )
    modules = datamodule.poison.trigger.modules() if datamodule.poison is not None else ()
    known = tuple({type(module) for module in modules if isinstance(module, Trigger)})
    datamodule.replace_poison(
        Poison(
            manifest.build_trigger(known),
            rate=manifest.rate,
            target=manifest.build_label_map(),
            mode="static" if manifest.mode == "static" else "dynamic",
            clean_label=manifest.clean_label,
            # A manifest has no scorer: without the config's, training images that are looked at would be others.
            selection=None if datamodule.poison is None else datamodule.poison.selection,
            cover_rate=manifest.cover_rate,
            seed=manifest.seed,
            cover_classes=manifest.cover_classes,
            crafting=_crafting_of(manifest, datamodule.poison),
        ),
        manifest,
    )
    return manifest


def use_trained_trigger_of(
    checkpoint: Mapping[str, Any], path: Path, datamodule: ImageDataModule, *, override: bool = False
) -> None:
    """Take the weights of a trained trigger from a checkpoint that has no manifest, such as a plain ``Trainer``'s.

    Without a poison there is nothing to take them to. A trigger that no model trains is left as it is.

    Args:
        checkpoint: The checkpoint.
        path: Where it came from, for messages.
        datamodule: The data; the weights of its poison's trigger are replaced.
        override: Where they cannot be, keep the config's trigger as it is.

    Raises:
        MisconfigurationException: If config and checkpoint do not both have a trained trigger, or none.
        ValueError: If the weights are not those of the config's trigger.
    """
    if datamodule.poison is None:
        return
    trigger, weights = datamodule.poison.trigger, checkpoint.get(TRIGGER_KEY)
    name = type(trigger).__name__
    is_trained = any(isinstance(part, Trigger) and part.is_trained for part in trigger.modules())
    if weights is None and is_trained:
        why = (
            f"`{name}` is trained with the model, but {path} holds neither a manifest nor the trigger's weights, so "
            "that the attack would be measured with those that the trigger was made with."
        )
        if override:
            rank_zero_warn(why)
            return
        raise MisconfigurationException(
            f"{why} Use a checkpoint of the run that trained it, leave `data.poison` out, or keep the config's trigger "
            "as it is by `--override-trigger`."
        )
    if weights is None or (override and not is_trained):
        return
    if not is_trained:
        raise MisconfigurationException(
            f"{path} holds a trigger that was trained with its model, but the config's is `{name}`. Use the config "
            "that it was trained with, leave `data.poison` out, or evaluate with the config's by `--override-trigger`."
        )
    try:
        if not isinstance(weights, Mapping):
            raise ValueError(f"expected them to be a mapping, but got a {type(weights).__name__}")
        trigger.restore(datamodule.image_shape, weights)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The weights of the trigger in {path} are not those of the config's `{name}`: {error}"
        ) from error


def _crafting_of(manifest: PoisonManifest, given: Poison | None) -> Crafting | None:
    """Return the config's crafting, if there is one; it was compared with the checkpoint's."""
    if manifest.crafting is None:
        return None
    crafting = given.crafting if given is not None else None
    return crafting if crafting is not None else AbsentCrafting(manifest.crafting)


def evaluation_batches(
    datamodule: ImageDataModule, device: torch.device | str, max_images: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return finished test batches: ``clean`` and, where the attack is known, ``poisoned`` with the attacker's labels.

    Args:
        datamodule: The data; its batch size and its poison are used.
        device: Where the batches are made.
        max_images: At most so many images per set, spread evenly over it; positive.

    Returns:
        Set -> batches of images ``(B, C, H, W)`` in [0, 1] and labels ``(B,)``.

    Raises:
        ValueError: If ``max_images`` is not positive.
    """
    if max_images < 1:
        raise ValueError(f"Expected argument `max_images` to be a positive integer, but got {max_images}.")
    sets = {}
    for name, loader in zip(("clean", "poisoned"), datamodule.test_dataloader(), strict=False):
        # The same images whatever the number of processes; each that asks gets them all.
        loader.place = Place
        count = min(max_images, len(loader.positions))
        loader.positions = loader.positions[torch.linspace(0, len(loader.positions) - 1, count).round().long()]
        batches = (datamodule.on_after_batch_transfer(raw.to(device), 0) for raw in loader)
        sets[name] = [(batch[0], batch[1]) for batch in batches]
    return sets


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
