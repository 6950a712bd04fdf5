"""``lightning-bd landscape``: the loss on a plane through a checkpoint's weights."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_bd.commands.looking import COLUMNS, cells, keep_figure, prepare, progress
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.loss_surface import filter_normalized_directions, surface
from lightning_bd.reports import landscape_figure
from lightning_bd.tables import write_rows

__all__ = ("landscape",)


def landscape(
    trainer: Trainer,
    model: LightningModule,
    datamodule: ImageDataModule,
    name: str,
    folder: Path,
    *,
    points: int,
    reach: float,
    max_images: int,
    seed: int,
) -> None:
    """Write ``landscape.csv`` and ``landscape.png``.

    Args:
        trainer: Knows the device, and whether to show progress.
        model: The model.
        datamodule: The test images.
        name: What to call the model.
        folder: Where to write.
        points: Points along each direction, odd and at least 3, so that the model itself is one.
        reach: Largest step along each direction, positive; 1 is as large as the weights.
        max_images: At most so many test images per set.
        seed: Seed of the directions.

    Raises:
        ValueError: If ``points`` or ``reach`` is out of its range.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"Expected argument `points` to be an odd integer of at least 3, but got {points}.")
    if not reach > 0:
        raise ValueError(f"Expected argument `reach` to be a positive float, but got {reach}.")
    data = prepare(trainer, model, datamodule, max_images)
    half = points // 2
    steps = [reach * step / half for step in range(-half, half + 1)]
    directions = filter_normalized_directions(model, keyed_generator(seed, "landscape"))
    rows = []
    grid = surface(model, directions, steps, steps, data)
    for point in progress(grid, points**2, "landscape", trainer):
        rows.append({"alpha": f"{point.alpha:.6g}", "beta": f"{point.beta:.6g}", **cells(point.results)})
    table = folder / "landscape.csv"
    write_rows(table, ("alpha", "beta", *COLUMNS), rows)
    keep_figure(landscape_figure(table, name), table.with_suffix(".png"))
