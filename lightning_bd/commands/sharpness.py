"""``lightning-bd sharpness``: top Hessian eigenvalue and the largest loss in a ball."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_bd.commands.looking import keep_figure, prepare, progress
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.sharpness import max_loss_in_ball, top_hessian_eigenvalue
from lightning_bd.reports import sharpness_figure
from lightning_bd.tables import write_rows

__all__ = ("sharpness",)

_COLUMNS = ("data", "loss", "top_eigenvalue", "converged", "rho", "worst_loss", "sharpness")


def sharpness(
    trainer: Trainer,
    model: LightningModule,
    datamodule: ImageDataModule,
    name: str,
    folder: Path,
    *,
    rho: float,
    steps: int,
    iterations: int,
    max_images: int,
    seed: int,
) -> list[dict[str, str]]:
    """Write ``sharpness.csv`` and ``sharpness.png``; return the table's rows.

    Args:
        trainer: Knows the device, and whether to show progress.
        model: The model.
        datamodule: The test images.
        name: What to call the model.
        folder: Where to write.
        rho: Radius of the ball, positive.
        steps: Steps of ascent in the ball, positive.
        iterations: Most steps of the power iteration, positive.
        max_images: At most so many test images per set.
        seed: Seed of the power iteration's start.
    """
    data = prepare(trainer, model, datamodule, max_images)
    rows = []
    for kind, batches in progress(data.items(), len(data), "sharpness", trainer):
        ball = max_loss_in_ball(model, batches, rho, steps)
        top = top_hessian_eigenvalue(model, batches, iterations, generator=keyed_generator(seed, "sharpness", kind))
        rows.append(
            {
                "data": kind,
                "loss": f"{ball.loss:.6g}",
                "top_eigenvalue": f"{top.value:.6g}",
                "converged": str(top.converged).lower(),
                "rho": f"{rho:g}",
                "worst_loss": f"{ball.worst_loss:.6g}",
                "sharpness": f"{ball.sharpness:.6g}",
            }
        )
    table = folder / "sharpness.csv"
    write_rows(table, _COLUMNS, rows)
    keep_figure(sharpness_figure(table, name), table.with_suffix(".png"))
    return rows
