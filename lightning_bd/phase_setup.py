"""What a phase is given: its data, a fresh Trainer, its loggers and its optimizer."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lightning_bd.batch import PoisonMode
from lightning_bd.checkpointing import AtomicCheckpointIO
from lightning_bd.datamodules import ImageDataModule, PhaseData
from lightning_bd.phase import Phase
from lightning_bd.phase_logger import PhaseTensorBoardLogger
from lightning_bd.quiet import quiet

__all__ = ("attackers_splits", "check_defender", "data_of", "fresh_trainer", "loggers_of", "optimizer_of")


def data_of(phase: Phase, datamodule: ImageDataModule) -> PhaseData:
    """Return what a phase trains on.

    Args:
        phase: The phase, with its name.
        datamodule: Has the poison, whose mode holds where the phase does not say.
    """
    mode: PoisonMode | None = None
    if phase.poisoned is True:
        mode = datamodule.poison.mode if datamodule.poison is not None else "dynamic"
    elif phase.poisoned is not False:
        mode = phase.poisoned
    return PhaseData(phase.name or "", phase.splits, mode, phase.batch_size)


def attackers_splits(phases: Mapping[str, Phase]) -> tuple[str, ...] | None:
    """Return the splits that the attacker has: those of the first poisoned phase; ``None`` without one.

    Args:
        phases: Name -> phase.
    """
    return next((phase.splits for phase in phases.values() if phase.poisoned), None)


def check_defender(name: str, datamodule: ImageDataModule, data: PhaseData) -> None:
    """Cut the defender's view once, so that a split that is too small is known before hours of training.

    Args:
        name: Name of the phase, for the message.
        datamodule: The data.
        data: What the phase trains on.

    Raises:
        MisconfigurationException: If a class has too few images.
    """
    try:
        datamodule.defender_view(data)
    except ValueError as error:
        raise MisconfigurationException(
            f"Phase `{name}`: the defender's images are cut into train and validation, and are too few. {error}"
        ) from error


def fresh_trainer(given: Mapping[str, Any], phase: Phase, **ours: Any) -> Trainer:
    """Make the Trainer of one phase, or of one test.

    Args:
        given: Arguments of all phases' Trainers.
        phase: Its ``trainer`` overrides them.
        ours: Arguments that the run decides; ``callbacks`` must be among them.
    """
    arguments = {**given, **(phase.trainer or {}), **ours}
    arguments["strategy"] = copy.deepcopy(arguments.get("strategy", "auto"))
    arguments["use_distributed_sampler"] = False  # our loaders know their rank
    plugins = arguments.get("plugins") or []
    plugins = [*plugins] if isinstance(plugins, Sequence) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    arguments["plugins"] = plugins
    arguments["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in arguments["callbacks"])
    if arguments.get("enable_model_summary") is None:
        arguments["enable_model_summary"] = False
    with quiet():
        return Trainer(**arguments)


def loggers_of(given: Mapping[str, Any], path: Path, first_step: int) -> list[Logger]:
    """Return a phase's loggers: TensorBoard in its folder, unless the run says otherwise.

    Args:
        given: Arguments of all phases' Trainers.
        path: The phase's folder.
        first_step: Where the phase begins on the run's axis of steps.
    """
    logger = given.get("logger")
    if logger is None or logger is True:
        return [PhaseTensorBoardLogger(path, first_step)]
    if logger is False:
        return []
    return list(logger) if isinstance(logger, Sequence) else [logger]


@contextmanager
def optimizer_of(phase: Phase, model: LightningModule) -> Iterator[None]:
    """Let the model configure the phase's optimizer and scheduler inside the block.

    Args:
        phase: The phase; without an optimizer the model's own is left.
        model: The model; its ``configure_optimizers`` is put back.
    """
    if phase.optimizer is None:
        yield
        return
    make_optimizer, make_scheduler = phase.optimizer, phase.lr_scheduler

    def configure_optimizers(self: LightningModule) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.parameters())
        if make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": make_scheduler(optimizer)}

    model.configure_optimizers = MethodType(configure_optimizers, model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.__dict__["configure_optimizers"]
