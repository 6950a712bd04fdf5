"""Writing the poisoned training set, and the clean test set, as a folder of images per class."""

from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_bd.commands.looking import progress
from lightning_bd.datamodules import ImageDataModule, PhaseData
from lightning_bd.datamodules.image_tree import INCOMPLETE, ImageTreeWriter, check_shape, unfinished
from lightning_bd.datamodules.loader import BatchLoader, Place
from lightning_bd.datamodules.rendering import to_bytes
from lightning_bd.manifest import PoisonManifest

__all__ = ("PoisonFailedError", "PoisonedCopy", "write_poisoned_copy")


class PoisonFailedError(RuntimeError):
    """The folder could not be written to its end."""


@dataclass(frozen=True)
class PoisonedCopy:
    """What was written.

    Attributes:
        images: Number of training images.
        poisoned: How many of them have the trigger and the attacker's label.
        covers: How many of them are cover samples.
        test_images: Number of test images.
    """

    images: int
    poisoned: int
    covers: int
    test_images: int


def write_poisoned_copy(trainer: Trainer, data: ImageDataModule, phase: PhaseData, folder: Path) -> PoisonedCopy:
    """Write what a static phase trains on, and the test set.

    Args:
        trainer: Decides whether a progress bar is shown.
        data: The data, with a poison.
        phase: The phase; its poison is static.
        folder: Where to; missing or empty.

    Raises:
        MisconfigurationException: If the folder is not empty, or its format has no room for such images.
        PoisonFailedError: If writing fails, such as on a full disk.
    """
    check_shape(data.image_shape)
    stored = data.stored_dataloader(phase)
    test = data.loaders.clean(data.test_images, "test")
    manifest = data.manifest((phase,))
    assert manifest is not None
    # The files are what they are, whatever the config's mode.
    tensors = manifest.tensors | {"order.train": stored.positions.clone()}
    manifest = replace(manifest, mode="static", tensors=tensors)
    try:
        with unfinished(folder):
            _write(trainer, data, {"train": stored, "test": test}, folder, manifest)
    except OSError as error:
        why = error.strerror or str(error)
        left = (
            f"What is there is not complete, and marked so by the file {INCOMPLETE}. Make room, remove the folder and"
            " give the same command again."
            if (folder / INCOMPLETE).exists()
            else "Give another `--output`."
        )
        raise PoisonFailedError(
            f"The poisoned data set could not be written to {folder.absolute()}: {why}. {left}"
        ) from error
    covers = int(stored.static_covers[stored.positions].sum()) if stored.static_covers is not None else 0
    poisoned = len(manifest.tensors[f"indices.{phase.name}"])
    return PoisonedCopy(len(stored.positions), poisoned, covers, len(test.positions))


def _write(
    trainer: Trainer, data: ImageDataModule, parts: dict[str, BatchLoader], folder: Path, manifest: PoisonManifest
) -> None:
    writer = ImageTreeWriter(folder, data.train_images.class_names, data.image_shape)
    for part, loader in parts.items():
        loader.place = Place
        loader.batch_size = 512
        for raw in progress(loader, len(loader), f"Writing {part} images", trainer):
            images, labels = data.on_after_batch_transfer(raw, 0)[:2]
            # Multiples of 1/255 already: this is exact.
            writer.add(part, to_bytes(images.float()), labels, raw.indices)
    writer.finish()
    manifest.save(folder)
