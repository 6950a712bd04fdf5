"""``lightning-bd interpolate``: loss and accuracy on the line between two checkpoints."""

import itertools
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_bd.commands.looking import COLUMNS, cells, keep_figure, prepare, progress
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.functional.loss_surface import line
from lightning_bd.reports import interpolation_figure
from lightning_bd.tables import write_rows

__all__ = ("interpolate",)


def interpolate(
    trainer: Trainer,
    model: LightningModule,
    datamodule: ImageDataModule,
    ends: tuple[dict[str, Tensor], dict[str, Tensor]],
    names: tuple[str, str],
    folder: Path,
    *,
    points: int,
    max_images: int,
    recalibrate: bool,
) -> None:
    """Write ``interpolation.csv`` and ``interpolation.png``.

    Args:
        trainer: Knows the device, and whether to show progress.
        model: Takes the weights.
        datamodule: The test images, and training images for ``recalibrate``.
        ends: The weights at both ends.
        names: What to call them.
        folder: Where to write.
        points: Number of positions, at least 2.
        max_images: At most so many test images per set.
        recalibrate: Measure BatchNorm's statistics anew at each position, on as many clean training images.

    Raises:
        ValueError: If ``points`` is too small.
    """
    if points < 2:
        raise ValueError(f"Expected argument `points` to be an integer of at least 2, but got {points}.")
    data = prepare(trainer, model, datamodule, max_images)
    calibration = None
    if recalibrate:
        loader = datamodule.clean_fit_dataloader()
        number = -(-max_images // loader.batch_size)
        device = trainer.strategy.root_device
        calibration = [
            datamodule.on_after_batch_transfer(raw.to(device), 0)[0] for raw in itertools.islice(loader, number)
        ]
    positions = [step / (points - 1) for step in range(points)]
    rows = []
    for point in progress(line(model, *ends, positions, data, calibration), points, "interpolating", trainer):
        rows.append({"position": f"{point.position:.6g}", **cells(point.results)})
    table = folder / "interpolation.csv"
    write_rows(table, ("position", *COLUMNS), rows)
    keep_figure(interpolation_figure(table, names), table.with_suffix(".png"))
