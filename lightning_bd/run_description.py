"""What makes two attempts the same run: model, data, seed, Trainer arguments and phases."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar

from lightning_bd.callbacks.defense import Defense
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.description import Description, describe
from lightning_bd.phase import Phase

__all__ = ("describe_phase", "describe_run")

# Trainer arguments that may differ between two attempts at one run.
_FREE = {
    "callbacks", "default_root_dir", "enable_checkpointing", "enable_model_summary", "enable_progress_bar",
    "log_every_n_steps", "logger", "max_epochs", "plugins", "profiler",
}  # fmt: skip
_ONLY_SHOW = (ProgressBar, ModelSummary, LearningRateMonitor, DeviceStatsMonitor)
# Options of the data that do not change what a batch is; the images themselves are known by their SHA-256.
_SAME_DATA = {"root", "download", "num_workers", "in_memory", "batch_format"}


def describe_run(
    model: LightningModule, datamodule: ImageDataModule, arguments: Mapping[str, Any], processes: int
) -> dict[str, Description]:
    """Describe what all phases of a run share.

    Args:
        model: The model.
        datamodule: The data; known by its content, not by where it lies.
        arguments: Arguments of each phase's Trainer; loggers, progress bars and the like are left out.
        processes: Number of processes.
    """
    described, data = describe(model), describe(datamodule)
    assert isinstance(described, dict)
    assert isinstance(data, dict)
    if isinstance(model, BackdoorClassifier):
        described["optimizer"] = describe(model.optimizer_factory)
        described["lr_scheduler"] = describe(model.lr_scheduler_factory)
    data = {name: value for name, value in data.items() if name not in _SAME_DATA}
    if len(datamodule.excluded):
        # What a file says may change.
        data["exclude"] = hashlib.sha256(datamodule.excluded.numpy().tobytes()).hexdigest()
    trainer = {k: describe(v) for k, v in arguments.items() if k not in _FREE and v is not None}
    # What a user's own callback does is not known here; of the known ones, those that show something may differ.
    given = arguments.get("callbacks") or []
    given = [c for c in given if type(c).__module__.startswith("lightning") and not isinstance(c, _ONLY_SHOW)]
    if given:
        trainer["callbacks"] = [describe(callback) for callback in given]
    return {
        "model": described,
        "data": {**data, "sha256": datamodule.fingerprint()},
        "seed": datamodule.run_seed,
        "processes": processes,
        "trainer": trainer,
    }


def describe_phase(phase: Phase, epochs: int, start_from: str, epoch_limit: int | None) -> dict[str, Description]:
    """Describe one phase.

    Args:
        phase: The phase.
        epochs: Its epochs, the run's cap applied.
        start_from: The phase, or ``init``, that it starts from.
        epoch_limit: The run's cap, which a defense applies to its own epochs.
    """
    described = {item.name: describe(getattr(phase, item.name)) for item in fields(phase)}
    if any(isinstance(callback, Defense) for callback in phase.callbacks):
        described["epoch_limit"] = epoch_limit
    return {**described, "max_epochs": epochs, "start_from": start_from}
