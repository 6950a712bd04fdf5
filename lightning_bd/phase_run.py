"""Running the phases: one folder, one fresh Trainer and one result each."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_bd.attack_record import AttackRecord
from lightning_bd.callbacks.defense import Defense, NotApplicableError
from lightning_bd.carrying import carried_states, hand_over, names_of_carriers
from lightning_bd.checkpointing import (
    RECORD_KEY,
    check_weights,
    read_checkpoint,
    save_atomically,
)
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.description import Description
from lightning_bd.files import write_text_atomically
from lightning_bd.functional.draws import keyed_seed
from lightning_bd.functional.evaluation import check_finite_weights
from lightning_bd.manifest import PoisonManifest
from lightning_bd.phase import INIT, Phase
from lightning_bd.phase_callbacks import (
    ElapsedTime,
    EpochCheckpoint,
    RunRecord,
    SeedEachBatch,
    StopOnNonFiniteLoss,
    TriggerPreview,
)
from lightning_bd.phase_logger import PhaseTensorBoardLogger
from lightning_bd.phase_measurement import copy_state, distance, rating, success_interval, write_images, write_stages
from lightning_bd.phase_setup import check_defender, data_of, fresh_trainer, loggers_of, optimizer_of
from lightning_bd.quiet import expected_warnings, quiet, seed_globals
from lightning_bd.run_description import describe_phase, describe_run
from lightning_bd.run_folder import PhaseFolder, PhaseResult, RunFolder

__all__ = ("PhaseRun", "is_first_process")


class _BrokenModelError(Exception):
    """A defense left weights that are not finite."""


class PhaseRun:
    """One run of a tree of phases.

    Args:
        phases: Name -> phase.
        parents: The phase, or ``init``, that each starts from.
        model: The model; its weights change from phase to phase.
        datamodule: The data.
        arguments: Arguments of each phase's Trainer.
        processes: Number of processes.
        config: The resolved config as YAML, saved with the run and its checkpoints.
        checkpoint_interval: Least seconds between two checkpoints of a phase.
        collects: Whether finished phases of earlier runs in the folder that are not among ``phases`` keep their rows.
        origin: What else makes it the same run, such as the checkpoint that it starts from.
        manifest: The attack's record, where it is not the datamodule's to tell.
        save_manifest: Whether the record is written beside the run and into its checkpoints.
        fresh: Whether an existing folder is renamed, to start over.
        unknown: Why attack success is not known, for the note of rows without one.
        barrier: How processes that all started by themselves wait for the first; ``None`` if it starts the others.

    Raises:
        MisconfigurationException: If the data lacks what a phase needs, or does not fit the model.
    """

    def __init__(
        self,
        phases: Mapping[str, Phase],
        parents: Mapping[str, str],
        model: LightningModule,
        datamodule: ImageDataModule,
        *,
        arguments: Mapping[str, Any],
        processes: int = 1,
        config: str | None = None,
        checkpoint_interval: float = 0.0,
        collects: bool = False,
        origin: Mapping[str, Description] | None = None,
        manifest: PoisonManifest | None = None,
        save_manifest: bool = True,
        fresh: bool = False,
        unknown: str = "",
        barrier: Callable[[], None] | None = None,
    ) -> None:
        self._phases = phases
        self._parents = parents
        self._model = model
        self._datamodule = datamodule
        self._arguments = arguments
        self._processes = processes
        self._config = config
        self._checkpoint_interval = checkpoint_interval
        self._origin = origin or {}
        self._fresh = fresh
        self._unknown = unknown
        self._barrier = barrier if barrier is not None else lambda: None
        self._data = {name: data_of(phase, datamodule) for name, phase in phases.items()}
        poisoned = any(phase.poisoned for phase in phases.values())
        self._attack = AttackRecord(datamodule, manifest, saved=save_manifest, poisoned=poisoned)
        root = Path(arguments.get("default_root_dir") or Path("runs") / "phases")
        self.folder = RunFolder(root, list(phases), collects=collects)
        if is_first_process():
            datamodule.prepare_data()  # downloads, where asked to; the data is looked at before a Trainer would do it
            self._restore_trigger()
            for name, data in self._data.items():
                datamodule.set_phase(data)  # a trigger that is learnt is kept on disk, for the other processes
                if processes > 1 and (fresh or self.folder.phase(name).result() is None):
                    datamodule.craft(data)  # and so are crafted images
        self._barrier()
        self._restore_trigger()
        for data in self._data.values():
            datamodule.set_phase(data)
        for name, phase in phases.items():
            if phase.defends:
                check_defender(name, datamodule, self._data[name])
        if not is_overridden("test_step", model):
            raise MisconfigurationException(
                f"Each phase ends with a test, but `{type(model).__name__}` has no `test_step`. Add one, or use "
                "BackdoorClassifier."
            )
        wanted = getattr(model, "num_classes", datamodule.num_classes)
        if wanted != datamodule.num_classes:
            raise MisconfigurationException(
                f"The model has `num_classes` {wanted}, but {type(datamodule).__name__} has {datamodule.num_classes}."
            )

    def open_folder(self) -> None:
        """Make the run's folder, or check that the one there belongs to this run.

        Raises:
            MisconfigurationException: If the folder belongs to another run.
        """
        if is_first_process():
            self._open_folder()
        self._barrier()

    def _open_folder(self) -> None:
        if self._fresh and (old := self.folder.rename_old()) is not None:
            rank_zero_info(f"The old run was renamed to {old}.")
        phases = {name: self._describe_phase(phase) for name, phase in self._phases.items()}
        run = describe_run(self._model, self._datamodule, self._arguments, self._processes)
        self.folder.open({**run, **self._origin}, phases)
        if self._config is not None:
            write_text_atomically(self.folder.root / "config.yaml", self._config)
        # A trained trigger's record is that of the last phase that trained it.
        if self._attack.trained_trigger is None or not (self.folder.root / "manifest.json").is_file():
            self._attack.save(self.folder.root, self._data.values())
        if not self.folder.initial.is_file():
            initial: dict[str, Any] = {"state_dict": self._model.state_dict()}
            if self._attack.trained_trigger is not None and (manifest := self._datamodule.manifest()) is not None:
                initial[RECORD_KEY] = {"tensors": manifest.tensors}
            save_atomically(initial, self.folder.initial)

    def _restore_trigger(self) -> None:
        if not self._fresh:
            self._attack.restore(self.folder.root)

    def load_last(self) -> None:
        """Give the model the final weights of the last phase; of those that were applicable."""
        finals = [self.folder.phase(name).final for name in self._phases]
        self._load([self.folder.initial, *(path for path in finals if path.is_file())][-1])

    def run(self, name: str) -> None:
        """Run one phase, whose parent has finished, unless it has finished before.

        Args:
            name: The phase.
        """
        phase, parent, here = self._phases[name], self._parents[name], self.folder.phase(name)
        if here.result() is not None:
            rank_zero_info(f"Phase `{name}` is finished: skipped.")
            if is_first_process():
                self.folder.write_results()  # the run may have been killed before it did
            return
        rank_zero_info(f"Phase `{name}`: {self._summary(phase)}")
        if is_first_process():
            self.folder.start_phase(name, self._describe_phase(phase))
        self._datamodule.set_phase(self._data[name], None if parent == INIT else self._data[parent])
        before = None if parent == INIT else self.folder.phase(parent).result()
        if before is not None and not before.applied:
            raise MisconfigurationException(
                f"Phase `{name}` starts from `{parent}`, which left no model: {before.note}."
            )
        first_step = 0 if before is None else before.steps
        loggers = loggers_of(self._arguments, here.path, first_step)
        start = self.folder.initial if parent == INIT else self.folder.phase(parent).final
        parent_record = self._load(start)
        start_weights = copy_state(self._model)
        if here.final.is_file():
            record = self._load(here.final)["result"]
        else:
            seed_globals(keyed_seed(self._datamodule.run_seed, name, "start"))
            try:
                inherited = parent_record.get("carried", {})
                hand_over(inherited, phase.callbacks)
                record = self._train(phase, here, loggers, start_weights, inherited)
            except NotApplicableError as error:
                self._finish_without_model(name, parent, first_step, f"not applicable: {error}")
                return
            except _BrokenModelError as error:
                self._finish_without_model(name, parent, first_step, f"failed: {error}")
                return
        if is_first_process() and self._attack.trained_trigger is not None and phase.poisoned:
            self._attack.save(self.folder.root, self._data.values())
        last_step = first_step + record["steps"]
        for logger in loggers:
            if isinstance(logger, PhaseTensorBoardLogger):
                logger.first_step = last_step
        tester = fresh_trainer(self._arguments, Phase("test"), logger=loggers, enable_progress_bar=False, callbacks=[])
        with quiet(), expected_warnings():
            metrics = tester.test(self._model, datamodule=self._datamodule, verbose=False)[0]
        if is_first_process():
            accuracy, success = metrics.get("test/clean_accuracy"), metrics.get("test/attack_success_rate")
            limit = tester.limit_test_batches
            whole = isinstance(limit, float) and limit == 1.0  # an integer is a number of batches
            low, high = success_interval(success, self._datamodule, whole=whole)
            notes = [record["note"], self._unknown if success is None else ""]
            here.finish(
                PhaseResult(
                    phase=name,
                    start_from=parent,
                    clean_accuracy=accuracy,
                    attack_success_rate=success,
                    robust_accuracy=metrics.get("test/robust_accuracy"),
                    epochs=record["epochs"],
                    seconds=round(record["seconds"], 2),
                    steps=last_step,
                    note="; ".join(note for note in notes if note),
                    values=record["values"],
                    attack_success_low=low,
                    attack_success_high=high,
                    defense_effectiveness_rating=rating(before, accuracy, success) if phase.defends else None,
                    distance=distance(self._model, start_weights),
                    defends=phase.defends,
                )
            )
            self.folder.write_results()
        tester.strategy.barrier("phase finished")

    def _finish_without_model(self, name: str, parent: str, steps: int, note: str) -> None:
        """Give a phase whose defense cannot work here, or broke the model, its row; it leaves no model."""
        rank_zero_info(f"Phase `{name}`: {note}")
        if is_first_process():
            result = PhaseResult(name, parent, None, None, None, 0, 0.0, steps, note, applied=False, defends=True)
            self.folder.phase(name).finish(result)
            self.folder.write_results()
        self._barrier()

    def _train(
        self,
        phase: Phase,
        here: PhaseFolder,
        loggers: list[Logger],
        start: Mapping[str, Tensor],
        inherited: Mapping[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """Fit one phase and write its final checkpoint; return what the checkpoint says of the fit."""
        assert phase.name is not None
        data: LightningDataModule = self._datamodule
        if phase.defends:
            data = view = self._datamodule.defender_view(self._data[phase.name])
            view.epoch_limit = self._arguments.get("max_epochs")
        manifest = self._attack.manifest(self._data[name] for name in self._lineage(phase.name))
        elapsed = ElapsedTime()
        run_record = RunRecord(phase.name, manifest, self._config, self._attack.trained_trigger)
        # A defense can reach its Trainer's callbacks: none of them may know the attack.
        carried = RunRecord(phase.name, None, None) if phase.defends else run_record
        callbacks = [*copy.deepcopy(self._arguments.get("callbacks") or []), *phase.callbacks]
        preview = [TriggerPreview(self._datamodule, self.folder.root)] if self._data[phase.name].poison else []
        trainer = fresh_trainer(
            self._arguments,
            phase,
            logger=loggers,
            default_root_dir=here.path,
            max_epochs=self._epochs(phase),
            num_sanity_val_steps=0,  # they would draw from the global random state before training
            callbacks=[
                SeedEachBatch(self._datamodule.run_seed, phase.name),
                StopOnNonFiniteLoss(phase.name, here.last),
                elapsed,
                *callbacks,
                *preview,
                carried,
                EpochCheckpoint(here.checkpoints, self._checkpoint_interval),
            ],
        )
        resume = here.last.is_file()
        if resume:
            rank_zero_info(f"Phase `{phase.name}` was cut: it goes on after its last complete epoch.")
        with optimizer_of(phase, self._model), expected_warnings(), quiet():
            trainer.fit(self._model, datamodule=data, ckpt_path=here.last if resume else None, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt(f"Phase `{phase.name}` was interrupted; the same command continues it.")
        defenses = [c for c in callbacks if isinstance(c, Defense)]
        reports = [defense.report for defense in defenses if defense.report is not None]
        record = {
            "epochs": trainer.current_epoch + sum(report.epochs for report in reports),
            "steps": trainer.global_step,
            "seconds": elapsed.seconds,
            "note": "; ".join(report.note for report in reports if report.note),
            "values": {key: float(value) for report in reports for key, value in report.values.items()},
        }
        if phase.defends:
            try:
                check_finite_weights(self._model, "the purified model")
            except ValueError as error:
                raise _BrokenModelError(str(error)) from None
        if trainer.is_global_zero:
            final = {
                "state_dict": self._model.state_dict(),
                "pytorch-lightning_version": lightning.__version__,
                "epoch": trainer.current_epoch,
                "global_step": trainer.global_step,
                RECORD_KEY: {
                    **run_record.content(),
                    "result": record,
                    "carried": carried_states(phase.callbacks, self._asked_for(phase.name), inherited),
                },
            }
            save_atomically(final, here.final)
            try:
                for report in reports:
                    write_images(report.images, here.path / "images")
                device = trainer.strategy.root_device
                write_stages(defenses, self._model, start, self._datamodule, here.path, device)
            except Exception as error:  # noqa: BLE001 (a picture is not worth the model that it shows)
                rank_zero_warn(f"Phase `{phase.name}`: its pictures or stages failed, the model is safe. ({error!r})")
        trainer.strategy.barrier("final checkpoint")
        return record

    def _load(self, path: Path) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        check_weights(self._model, checkpoint["state_dict"], path)
        self._model.load_state_dict(checkpoint["state_dict"])
        record: dict[str, Any] = checkpoint.get(RECORD_KEY, {})
        self._attack.take(record.get("tensors", {}), path)
        return record

    def _epochs(self, phase: Phase) -> int:
        cap = self._arguments.get("max_epochs")
        epochs = phase.max_epochs if phase.max_epochs is not None else cap
        if epochs is None:
            raise MisconfigurationException(f"Phase `{phase.name}` has no `max_epochs`, and neither has the trainer.")
        return int(epochs if cap is None or cap < 0 else min(epochs, cap))

    def _asked_for(self, name: str) -> set[str]:
        """Return the classes of callbacks that build on an earlier fit, in the phases that descend from this one."""
        later = [phase for other, phase in self._phases.items() if name in self._lineage(other)[:-1]]
        asked = {found for phase in later for found in names_of_carriers(phase.callbacks)}
        # A phase that builds on earlier ones may get a successor when the run has long finished.
        return asked | names_of_carriers(self._phases[name].callbacks)

    def _lineage(self, name: str) -> list[str]:
        names = [name]
        while (parent := self._parents[names[0]]) != INIT:
            names.insert(0, parent)
        return names

    def _summary(self, phase: Phase) -> str:
        split = " + ".join(phase.splits) or "all training images"
        kind = "a defender's view" if phase.defends else "poisoned" if phase.poisoned else "clean"
        epochs = self._epochs(phase)
        purified = any(isinstance(callback, Defense) for callback in phase.callbacks)
        length = f"{epochs} epochs" if epochs else "purified by its defense" if purified else "measured as it is"
        return f"{split} ({kind}), {length}, from `{self._parents[phase.name or '']}`"

    def _describe_phase(self, phase: Phase) -> dict[str, Description]:
        limit = self._arguments.get("max_epochs")
        return describe_phase(phase, self._epochs(phase), self._parents[phase.name or ""], limit)


def is_first_process() -> bool:
    """Return whether this process is the first of the run; also before any Trainer started the others."""
    return getattr(rank_zero_only, "rank", 0) == 0
