"""What is measured of a phase besides its rates: how sure they are, how far the weights moved, how it got there."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchvision.utils import save_image

from lightning_bd.callbacks.defense import Defense
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.evaluation import evaluation_batches
from lightning_bd.files import open_atomically
from lightning_bd.functional.backdoor import defense_effectiveness_rating, wilson_interval
from lightning_bd.functional.evaluation import evaluate
from lightning_bd.run_folder import PhaseResult
from lightning_bd.tables import write_rows

__all__ = ("copy_state", "distance", "rating", "success_interval", "write_images", "write_stages")

#: Images per set that the stages of a defense are measured on.
STAGE_IMAGES = 1000


def copy_state(model: LightningModule) -> dict[str, Tensor]:
    """Return a copy of a model's ``state_dict`` on the CPU.

    Args:
        model: The model.
    """
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def distance(model: LightningModule, start: Mapping[str, Tensor]) -> float:
    """Return the L2 distance of the parameters, all together, from those of a state dict.

    Args:
        model: The model as it is.
        start: Its ``state_dict`` as it was.
    """
    squares = [
        (parameter.detach().cpu().double() - start[name].cpu().double()).square().sum()
        for name, parameter in model.named_parameters()
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def success_interval(
    rate: float | None, datamodule: ImageDataModule, *, whole: bool = True
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % Wilson interval of an attack success rate on the test set; nothing for an unknown rate.

    Args:
        rate: The attack success rate, in [0, 1].
        datamodule: The data that it was measured on.
        whole: Whether all triggered test images were measured; of a part the number is not known here.
    """
    if rate is None or datamodule.poison is None or not whole:
        return None, None
    total = len(datamodule.test_dataloader()[1].positions)
    return wilson_interval(round(rate * total), total)


def rating(before: PhaseResult | None, accuracy: float | None, success: float | None) -> float | None:
    """Return the defense effectiveness rating against the phase before, ``None`` where a rate is unknown.

    Args:
        before: The result of the undefended model.
        accuracy: Clean accuracy after the defense, in [0, 1].
        success: Attack success rate after the defense, in [0, 1].
    """
    if before is None or None in (before.clean_accuracy, before.attack_success_rate, accuracy, success):
        return None
    assert before.clean_accuracy is not None
    assert before.attack_success_rate is not None
    assert accuracy is not None
    assert success is not None
    return defense_effectiveness_rating(before.clean_accuracy, accuracy, before.attack_success_rate, success)


def write_images(images: Mapping[str, Tensor], folder: Path) -> None:
    """Write the pictures of a defense's report as PNG files, small ones enlarged without smoothing.

    Args:
        images: Name -> ``(C, H, W)`` or ``(H, W)`` in [0, 1].
        folder: Where; made if there is an image.
    """
    for name, image in images.items():
        picture = image if image.ndim == 3 else image[None]
        scale = max(1, 128 // picture.shape[1])
        picture = picture.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
        with open_atomically(folder / f"{name}.png") as file:
            save_image(picture.detach().cpu().float(), file, format="png")


def write_stages(
    defenses: Sequence[Defense],
    model: LightningModule,
    start: Mapping[str, Tensor],
    datamodule: ImageDataModule,
    folder: Path,
    device: torch.device,
) -> None:
    """Write ``stages.csv``: clean accuracy and attack success along what a defense did, where it has stages.

    Measured after the defense is done, on at most 1,000 images per set; the defense never sees it.

    Args:
        defenses: Defenses that have run.
        model: The model; a copy of it is measured.
        start: The ``state_dict`` that the defense started from.
        datamodule: The test data and the attack, if known.
        folder: Where.
        device: Where to measure; the model has left it when its fit ended.
    """
    for defense in defenses:
        if defense.report is None:
            continue
        attacked = _detached_copy(model)
        attacked.load_state_dict(start)
        attacked.to(device).eval()
        positions = defense.stages(attacked, defense.report)
        rows = list(_measured(positions, attacked, datamodule))
        if rows:
            rows = [{"axis": defense.stage_axis, **row} for row in rows]
            write_rows(folder / "stages.csv", list(rows[0]), rows)


def _measured(
    positions: Iterator[float], model: LightningModule, datamodule: ImageDataModule
) -> Iterator[dict[str, str]]:
    sets = None
    for position in positions:
        sets = sets if sets is not None else evaluation_batches(datamodule, model.device, STAGE_IMAGES)
        row = {"position": f"{position:.6g}"}
        for column, name in (("clean_accuracy", "clean"), ("attack_success_rate", "poisoned")):
            row[column] = f"{evaluate(model, sets[name])[1]:.6f}" if name in sets else ""
        yield row


def _detached_copy(model: LightningModule) -> LightningModule:
    """Copy a module without its Trainer, which holds loggers and processes."""
    trainer, model.trainer = model._trainer, None
    try:
        return copy.deepcopy(model)
    finally:
        model.trainer = trainer
