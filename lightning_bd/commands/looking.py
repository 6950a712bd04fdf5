"""What ``interpolate``, ``landscape`` and ``sharpness`` share: test images, a progress bar, a figure."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from lightning_bd.datamodules import ImageDataModule
from lightning_bd.evaluation import evaluation_batches
from lightning_bd.files import open_atomically
from lightning_bd.functional.evaluation import Evaluation

__all__ = ("COLUMNS", "cells", "keep_figure", "prepare", "progress")

_Item = TypeVar("_Item")
#: Set -> the columns of its loss and its accuracy.
_SETS = {"clean": ("clean_loss", "clean_accuracy"), "poisoned": ("poisoned_loss", "attack_success_rate")}
#: Columns of a table of losses and accuracies.
COLUMNS = tuple(column for columns in _SETS.values() for column in columns)


def prepare(
    trainer: Trainer, model: LightningModule, datamodule: ImageDataModule, max_images: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Move the model to the Trainer's device and make the test batches there, clean and, if known, triggered.

    Args:
        trainer: Knows the device.
        model: The model.
        datamodule: The data.
        max_images: At most so many images per set.
    """
    device = trainer.strategy.root_device
    model.to(device)
    return evaluation_batches(datamodule, device, max_images)


def cells(results: Mapping[str, Evaluation]) -> dict[str, str]:
    """Return a row's cells of loss and accuracy; those of an unknown attack are left out.

    Args:
        results: Set -> loss and accuracy.
    """
    row: dict[str, str] = {}
    for name, result in results.items():
        loss, accuracy = _SETS[name]
        row |= {loss: f"{result.loss:.6g}", accuracy: f"{result.accuracy:.6f}"}
    return row


def progress(items: Iterable[_Item], total: int, title: str, trainer: Trainer) -> Iterator[_Item]:
    """Go through items under a progress bar, unless the Trainer shows none.

    Args:
        items: What to go through.
        total: How many there are.
        title: For the bar.
        trainer: Decides whether to show it.
    """
    hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
    return iter(tqdm(items, title, total, disable=hidden))


def keep_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, and beside it for TensorBoard.

    Args:
        figure: The figure.
        path: The PNG file.
    """
    with open_atomically(path) as file:
        figure.savefig(file, format="png")
    logger = TensorBoardLogger(path.parent, name="", version="")
    logger.experiment.add_figure(path.stem, figure)
    logger.finalize("success")
    rank_zero_info(f"Figure and table: {path}, {path.with_suffix('.csv').name}")
