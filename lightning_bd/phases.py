"""Phases of sequential learning, one fresh Trainer each."""

import copy
import inspect
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MethodType
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bd.batch import PoisonMode
from lightning_bd.callbacks.defense import Defense
from lightning_bd.checkpointing import (
    RECORD_KEY,
    AtomicCheckpointIO,
    CheckpointError,
    check_weights,
    read_checkpoint,
    save_atomically,
)
from lightning_bd.datamodules import ImageDataModule, PhaseData
from lightning_bd.description import Description, describe
from lightning_bd.evaluation import use_manifest_of, write_predictions
from lightning_bd.functional.draws import keyed_seed
from lightning_bd.phase import INIT, Phase, check_trainer_arguments, in_order, name_phases, phase_parents
from lightning_bd.phase_callbacks import ElapsedTime, RunRecord, SeedEachBatch, StopOnNonFiniteLoss, TriggerPreview
from lightning_bd.phase_logger import PhaseTensorBoardLogger
from lightning_bd.results_table import print_metrics, print_results
from lightning_bd.run_folder import PhaseFolder, PhaseResult, RunFolder

__all__ = ("MultiPhaseTrainer", "Phase")

# Trainer arguments that may differ between two attempts at one run.
_FREE = {
    "callbacks", "default_root_dir", "enable_checkpointing", "enable_model_summary", "enable_progress_bar",
    "log_every_n_steps", "logger", "max_epochs", "plugins", "profiler",
}  # fmt: skip

class MultiPhaseTrainer(Trainer):
    """A Trainer that runs a tree of phases, each with a fresh Trainer of its own.

    The weights go from phase to phase; optimizer, schedule, callbacks, split, batch size and Trainer arguments are
    each phase's own. After each phase the model is tested by another Trainer and a row added to ``results.csv``. The
    same command continues a run that was cut, with the same final weights: a finished phase is skipped, a cut one
    resumed at its last complete epoch. ``trainer.max_epochs``, if given, caps every phase.

    Without ``phases`` it is a plain ``Trainer``.

    Args:
        phases: Name -> phase, or a list of named phases.
        num_threads: Threads per process for operators on the CPU; PyTorch's default if not given. Small networks are
            as fast with one, and then do not suffer when something else uses a core.
        args: Arguments of ``lightning.pytorch.Trainer``.
        kwargs: Arguments of ``lightning.pytorch.Trainer``, the same for all phases.

    Raises:
        MisconfigurationException: If names repeat, ``start_from`` names no phase or closes a circle, or a phase's
            ``trainer`` has an argument that ``Trainer`` lacks.
    """

    def __init__(
        self,
        *args: Any,
        phases: dict[str, Phase] | list[Phase] | None = None,
        num_threads: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Trainer adds its own callbacks to the list that it is given, and strategies keep state: keep clean copies.
        self._arguments = {
            name: copy.deepcopy(value) if name in ("callbacks", "strategy") else value for name, value in kwargs.items()
        }
        if phases:
            kwargs = {**kwargs, "logger": False, "enable_checkpointing": False}
        with _quiet() if phases else _nothing():
            super().__init__(*args, **kwargs)
        self.phases = name_phases(phases or {})
        self._parents = phase_parents(self.phases)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"Expected argument `num_threads` to be a positive integer, but got {num_threads}.")
        self.num_threads = num_threads
        #: Start over: rename an existing run folder.
        self.fresh = False
        #: Evaluate with the config's trigger although the checkpoint has another.
        self.override_trigger = False
        #: The resolved config as YAML, saved with the run and in its checkpoints.
        self.resolved_config: str | None = None
        for phase in self.phases.values():
            check_trainer_arguments(phase)

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run every phase, skipping finished ones and resuming one that was cut.

        Args:
            model: The model; leaves with the weights of the last phase in the list.
            train_dataloaders: Only without phases.
            val_dataloaders: Only without phases.
            datamodule: The data; with phases an :class:`~lightning_bd.datamodules.ImageDataModule`.
            ckpt_path: Only without phases: checkpoint to resume from.
            weights_only: Only without phases: see ``Trainer.fit``.

        Raises:
            MisconfigurationException: If the run folder belongs to another run, or the data lacks what a phase needs.
        """
        if not self.phases:
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
            return
        if train_dataloaders is not None or val_dataloaders is not None or not isinstance(datamodule, ImageDataModule):
            raise MisconfigurationException(
                "A run with phases needs `datamodule=` one of lightning_bd.datamodules (or a subclass of "
                "ImageDataModule), because phases choose its splits."
            )
        if ckpt_path is not None:
            raise MisconfigurationException(
                "A run with phases resumes by itself: repeat the command with the same `trainer.default_root_dir`, "
                "without `ckpt_path`."
            )
        self._check_data(model, datamodule)
        folder = self._open_folder(model, datamodule)
        with _threads(self.num_threads):
            for name in in_order(self._parents):
                self._run_phase(name, model, datamodule, folder)
        last = next(reversed(self.phases))
        model.load_state_dict(read_checkpoint(folder.phase(last).final)["state_dict"])
        if rank_zero_only.rank == 0:
            print_results(folder.results(), folder.root)

    def validate(  # type: ignore[override]
        self,
        model: LightningModule,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Evaluate on the split `val`.

        Args:
            model: The model.
            dataloaders: Instead of `datamodule`.
            ckpt_path: Checkpoint to load first; its own trigger is used.
            verbose: Print the metrics.
            datamodule: The data.
            weights_only: Checkpoints are always loaded with `weights_only=True`; nothing else is accepted.
        """
        if isinstance(datamodule, ImageDataModule) and "val" not in datamodule.splits:
            raise MisconfigurationException(
                "There is no validation split: add one to `data.splits` (`val: 0.05`), or use `test`."
            )
        self._check_checkpoint(model, datamodule, ckpt_path, weights_only)
        own = isinstance(datamodule, ImageDataModule)
        with _expected_warnings():
            metrics = super().validate(model, dataloaders, ckpt_path, verbose and not own, datamodule, weights_only=True)
        if own and verbose and self.is_global_zero:
            print_metrics(metrics[0])
        return metrics

    def test(  # type: ignore[override]
        self,
        model: LightningModule,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Evaluate on the test set: clean accuracy, attack success rate, robust accuracy.

        Args:
            model: The model.
            dataloaders: Instead of `datamodule`.
            ckpt_path: Checkpoint to load first, such as a run's `NN_<phase>/final.ckpt`; its own trigger is used.
            verbose: Print the metrics.
            datamodule: The data.
            weights_only: Checkpoints are always loaded with `weights_only=True`; nothing else is accepted.
        """
        self._check_checkpoint(model, datamodule, ckpt_path, weights_only)
        own = isinstance(datamodule, ImageDataModule)
        with _expected_warnings():
            metrics = super().test(model, dataloaders, ckpt_path, verbose and not own, datamodule, weights_only=True)
        if own and verbose and self.is_global_zero:
            print_metrics(metrics[0])
        return metrics

    def predict(  # type: ignore[override]
        self,
        model: LightningModule,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predict the clean test set and write `predictions.csv` into `trainer.default_root_dir`.

        Args:
            model: The model.
            dataloaders: Instead of `datamodule`.
            datamodule: The data.
            return_predictions: Whether to return the predictions of all batches.
            ckpt_path: Checkpoint to load first.
            weights_only: Checkpoints are always loaded with `weights_only=True`; nothing else is accepted.
        """
        self._check_checkpoint(model, datamodule, ckpt_path, weights_only)
        with _expected_warnings():
            predictions = super().predict(
                model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only=True
            )
        if predictions and isinstance(datamodule, ImageDataModule):
            file = Path(self.default_root_dir) / f"predictions{f'_rank{self.global_rank}' * (self.world_size > 1)}.csv"
            write_predictions(predictions, file)
            rank_zero_info(f"Predictions: {file}")
        return predictions

    def _check_checkpoint(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        path: str | Path | None,
        weights_only: bool | None,
    ) -> None:
        """Check a checkpoint before Lightning loads it, and take its trigger over."""
        if weights_only is False:
            raise MisconfigurationException(
                "`weights_only` False would unpickle, and so run, whatever the checkpoint holds; leave it out."
            )
        if path is None:
            return
        checkpoint = read_checkpoint(Path(path))
        check_weights(model, checkpoint["state_dict"], Path(path))
        if isinstance(datamodule, ImageDataModule):
            use_manifest_of(checkpoint, Path(path), datamodule, override=self.override_trigger)

    def _check_data(self, model: LightningModule, datamodule: ImageDataModule) -> None:
        for phase in self.phases.values():
            datamodule.set_phase(_phase_data(phase, datamodule))
        wanted = getattr(model, "num_classes", datamodule.num_classes)
        if wanted != datamodule.num_classes:
            raise MisconfigurationException(
                f"The model has `num_classes` {wanted}, but {type(datamodule).__name__} has {datamodule.num_classes}."
            )

    def _open_folder(self, model: LightningModule, datamodule: ImageDataModule) -> RunFolder:
        folder = RunFolder(Path(self._arguments.get("default_root_dir") or Path.cwd()), list(self.phases))
        if rank_zero_only.rank == 0:
            if self.fresh and (old := folder.rename_old()) is not None:
                rank_zero_info(f"The old run was renamed to {old}.")
            folder.open(
                self._describe_run(model, datamodule), {n: self._describe_phase(p) for n, p in self.phases.items()}
            )
            if self.resolved_config is not None:
                (folder.root / "config.yaml").write_text(self.resolved_config, encoding="utf-8")
            manifest = datamodule.manifest(tuple(_phase_data(p, datamodule) for p in self.phases.values()))
            if manifest is not None:
                manifest.save(folder.root)
            if not folder.initial.is_file():
                save_atomically({"state_dict": model.state_dict()}, folder.initial)
        return folder

    def _run_phase(self, name: str, model: LightningModule, datamodule: ImageDataModule, folder: RunFolder) -> None:
        phase, parent = self.phases[name], self._parents[name]
        if folder.phase(name).result() is not None:
            rank_zero_info(f"Phase `{name}` is finished: skipped.")
            return
        rank_zero_info(f"Phase `{name}`: {self._summary(phase)}")
        here = folder.phase(name)
        if rank_zero_only.rank == 0:
            here = folder.start_phase(name, self._describe_phase(phase))
        data = _phase_data(phase, datamodule)
        datamodule.set_phase(data, None if parent == INIT else _phase_data(self.phases[parent], datamodule))
        parent_result = None if parent == INIT else folder.phase(parent).result()
        first_step = parent_result.steps if parent_result is not None else 0
        logger = self._logger(here.path, first_step)
        elapsed = ElapsedTime()
        if here.final.is_file():
            record = self._load(model, here.final)
        else:
            self._load(model, folder.initial if parent == INIT else folder.phase(parent).final)
            _seed(keyed_seed(datamodule.run_seed, name, "start") % 2**32)
            record = self._train(phase, data, model, datamodule, here, logger, elapsed)
            record["first_step"] = first_step
        tester = self._fresh_trainer(Phase("test"), logger=logger, enable_progress_bar=False, callbacks=[])
        for item in logger:
            if isinstance(item, PhaseTensorBoardLogger):
                item.first_step = first_step + record["steps"]
        with _quiet(), _expected_warnings():
            metrics = tester.test(model, datamodule=datamodule, verbose=False)[0]
        if rank_zero_only.rank == 0:
            here.finish(
                PhaseResult(
                    phase=name,
                    start_from=parent,
                    clean_accuracy=metrics.get("test/clean_accuracy"),
                    attack_success_rate=metrics.get("test/attack_success_rate"),
                    robust_accuracy=metrics.get("test/robust_accuracy"),
                    epochs=record["epochs"],
                    seconds=round(record["seconds"], 2),
                    steps=first_step + record["steps"],
                    note=record["note"],
                    values=record["values"],
                )
            )
            folder.write_results()
        tester.strategy.barrier("phase finished")

    def _train(
        self,
        phase: Phase,
        data: PhaseData,
        model: LightningModule,
        datamodule: ImageDataModule,
        folder: PhaseFolder,
        logger: list[Logger],
        elapsed: ElapsedTime,
    ) -> dict[str, Any]:
        """Fit one phase and write its final checkpoint; return the record that the checkpoint carries."""
        assert phase.name is not None
        fit_data: LightningDataModule = datamodule
        if phase.defends:
            fit_data = view = datamodule.defender_view(data)
            view.epoch_limit = self._arguments.get("max_epochs")
        lineage = self._lineage(phase.name)
        manifest = datamodule.manifest(tuple(_phase_data(self.phases[n], datamodule) for n in lineage))
        run_record = RunRecord(phase.name, manifest, self.resolved_config)
        callbacks = [*copy.deepcopy(self._arguments.get("callbacks") or []), *copy.deepcopy(phase.callbacks)]
        trainer = self._fresh_trainer(
            phase,
            logger=logger,
            default_root_dir=folder.path,
            max_epochs=self._epochs(phase),
            num_sanity_val_steps=0,  # they would draw from the global random state before training
            callbacks=[
                SeedEachBatch(datamodule.run_seed, phase.name),
                StopOnNonFiniteLoss(phase.name, folder.last),
                elapsed,
                *callbacks,
                *([TriggerPreview(datamodule, folder.path.parent)] if data.poison is not None else []),
                run_record,
                _last_epoch_checkpoint(folder.checkpoints),
            ],
        )
        if folder.last.is_file():
            rank_zero_info(f"Phase `{phase.name}` was cut: it goes on after its last complete epoch.")
        with _optimizer_of(phase, model), _expected_warnings(), _quiet():
            trainer.fit(
                model,
                datamodule=fit_data,
                ckpt_path=folder.last if folder.last.is_file() else None,
                weights_only=True,
            )
        if trainer.interrupted or trainer.state.status != "finished":
            raise KeyboardInterrupt(f"Phase `{phase.name}` was interrupted; the same command continues it.")
        reports = [c.report for c in callbacks if isinstance(c, Defense) and c.report is not None]
        record = {
            "epochs": trainer.current_epoch + sum(report.epochs for report in reports),
            "steps": trainer.global_step,
            "seconds": elapsed.seconds,
            "note": "; ".join(report.note for report in reports if report.note),
            "values": {k: float(v) for report in reports for k, v in report.values.items()},
        }
        if trainer.is_global_zero:
            save_atomically(
                {
                    "state_dict": model.state_dict(),
                    "pytorch-lightning_version": lightning.__version__,
                    "epoch": trainer.current_epoch,
                    "global_step": trainer.global_step,
                    RECORD_KEY: {**run_record.content(), "result": record},
                },
                folder.final,
            )
        trainer.strategy.barrier("final checkpoint")
        return record

    def _fresh_trainer(self, phase: Phase, **ours: Any) -> Trainer:
        arguments = {**self._arguments, **phase.trainer, **ours}
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
        with _quiet():
            return Trainer(**arguments)

    def _logger(self, path: Path, first_step: int) -> list[Logger]:
        given = self._arguments.get("logger")
        if given is None or given is True:
            return [PhaseTensorBoardLogger(path, first_step)]
        if given is False:
            return []
        return list(given) if isinstance(given, Sequence) else [given]

    def _load(self, model: LightningModule, path: Path) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        check_weights(model, checkpoint["state_dict"], path)
        model.load_state_dict(checkpoint["state_dict"])
        record: dict[str, Any] = checkpoint.get(RECORD_KEY, {}).get("result", {})
        return record

    def _epochs(self, phase: Phase) -> int:
        cap = self._arguments.get("max_epochs")
        epochs = phase.max_epochs if phase.max_epochs is not None else cap
        if epochs is None:
            raise MisconfigurationException(f"Phase `{phase.name}` has no `max_epochs`, and neither has the trainer.")
        return epochs if cap is None or cap < 0 else min(epochs, cap)

    def _lineage(self, name: str) -> list[str]:
        names = [name]
        while (parent := self._parents[names[0]]) != INIT:
            names.insert(0, parent)
        return names

    def _summary(self, phase: Phase) -> str:
        split = " + ".join(phase.splits) or "all training images"
        kind = "clean view for a defender" if phase.defends else "poisoned" if phase.poisoned else "clean"
        return f"{split} ({kind}), {self._epochs(phase)} epochs, from `{self._parents[phase.name or '']}`"

    def _describe_run(self, model: LightningModule, datamodule: ImageDataModule) -> dict[str, Description]:
        ignored = {"root", "download", "num_workers", "in_memory", "batch_format"}
        data = describe(datamodule)
        assert isinstance(data, dict)
        return {
            "model": describe(model),
            "data": {k: v for k, v in data.items() if k not in ignored} | {"sha256": datamodule.fingerprint()},
            "seed": datamodule.run_seed,
            "processes": self.num_devices * self.num_nodes,
            "trainer": {k: describe(v) for k, v in self._arguments.items() if k not in _FREE and v is not None},
        }

    def _describe_phase(self, phase: Phase) -> dict[str, Description]:
        described = {item.name: describe(getattr(phase, item.name)) for item in fields(phase)}
        return described | {"max_epochs": self._epochs(phase), "start_from": self._parents[phase.name or ""]}


def _phase_data(phase: Phase, datamodule: ImageDataModule) -> PhaseData:
    mode: PoisonMode | None = None
    if phase.poisoned is True:
        mode = datamodule.poison.mode if datamodule.poison is not None else "dynamic"
    elif phase.poisoned is not False:
        mode = phase.poisoned
    return PhaseData(phase.name or "", phase.splits, mode, phase.batch_size)


def _last_epoch_checkpoint(folder: Path) -> ModelCheckpoint:
    # `save_last=True` writes nothing unless a best checkpoint was saved at the same step (Lightning 2.6).
    return ModelCheckpoint(
        folder, filename="last", monitor=None, save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip


@contextmanager
def _optimizer_of(phase: Phase, model: LightningModule) -> Iterator[None]:
    """Let the model configure the phase's optimizer and scheduler inside the block."""
    if phase.optimizer is None:
        if phase.lr_scheduler is not None:
            raise MisconfigurationException(f"Phase `{phase.name}`: `lr_scheduler` needs an `optimizer` beside it.")
        yield
        return
    make_optimizer, make_scheduler = phase.optimizer, phase.lr_scheduler

    def configure_optimizers(self: LightningModule) -> Any:
        optimizer = make_optimizer(self.parameters())
        if make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": make_scheduler(optimizer)}

    model.configure_optimizers = MethodType(configure_optimizers, model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.__dict__["configure_optimizers"]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Use ``number`` threads for operators on the CPU inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep every new Trainer from announcing the hardware again."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Leave out what Lightning warns of and what is meant to be so."""
    with warnings.catch_warnings():
        # Steps count over epochs, so short epochs are logged too.
        warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging")
        # No split `val`, no validation.
        warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
        # Lightning 2.6 with torch 2.14 and later.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
