"""Phases of sequential learning, one fresh Trainer each."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import _EVALUATE_OUTPUT, _PREDICT_OUTPUT, EVAL_DATALOADERS, TRAIN_DATALOADERS

from lightning_bd.checkpointing import check_weights, read_checkpoint
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.evaluation import use_manifest_of, use_trained_trigger_of, write_predictions
from lightning_bd.phase import Phase, check_phase, in_order, name_phases, phase_parents
from lightning_bd.phase_run import PhaseRun, is_first_process
from lightning_bd.phase_setup import attackers_splits
from lightning_bd.quiet import expected_warnings, quiet, threads
from lightning_bd.results_table import print_metrics, print_results

__all__ = ("MultiPhaseTrainer", "Phase")


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
        checkpoint_interval: Least seconds between two checkpoints of a phase. They are written when an epoch ends; a
            cut phase goes on after the last one, with the same result. 0 writes one each epoch.
        save_manifest: Write the attack's record beside the run and into its checkpoints. Without it nobody can measure
            a released checkpoint's attack later, as is the case with the code of `SBL
            <https://arxiv.org/abs/2407.14738>`_.
        kwargs: Arguments of ``lightning.pytorch.Trainer``, the same for all phases; each phase gets its own copies of
            ``callbacks``.

    Raises:
        MisconfigurationException: If names repeat, ``start_from`` names no phase or closes a circle, or a phase's
            ``trainer`` has an argument that ``Trainer`` lacks.
    """

    def __init__(
        self,
        phases: dict[str, Phase] | list[Phase] | None = None,
        num_threads: int | None = None,
        checkpoint_interval: float = 0.0,
        save_manifest: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(kwargs.get("callbacks"), Callback):
            kwargs["callbacks"] = [kwargs["callbacks"]]
        # Trainer adds its own callbacks to the list that it is given, and strategies keep state: keep clean copies.
        self._arguments = {
            name: copy.deepcopy(value) if name in ("callbacks", "strategy") else value for name, value in kwargs.items()
        }
        if isinstance(kwargs.get("callbacks"), list):
            kwargs["callbacks"] = [*kwargs["callbacks"]]
        if phases:
            kwargs = {**kwargs, "logger": False, "enable_checkpointing": False}
            with quiet():
                super().__init__(**kwargs)
        else:
            super().__init__(**kwargs)
        self.phases = name_phases(phases or {})
        self._parents = phase_parents(self.phases)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"Expected argument `num_threads` to be a positive integer, but got {num_threads}.")
        if not checkpoint_interval >= 0:
            raise ValueError(
                f"Expected argument `checkpoint_interval` to be a non-negative number, but got {checkpoint_interval}."
            )
        self.num_threads = num_threads
        self.checkpoint_interval = checkpoint_interval
        self.save_manifest = save_manifest
        #: Start over: rename an existing run folder.
        self.fresh = False
        #: Evaluate with the config's trigger although the checkpoint has another.
        self.override_trigger = False
        #: Print the results table when the run ends.
        self.show_results = True
        #: The resolved config as YAML, saved with the run and in its checkpoints.
        self.resolved_config: str | None = None
        for phase in self.phases.values():
            check_phase(phase, self.phases)

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: TRAIN_DATALOADERS | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run every phase, skipping finished ones and resuming one that was cut.

        Args:
            model: The model; leaves with the weights of the last phase in the list that left a model.
            train_dataloaders: Only without phases.
            val_dataloaders: Only without phases.
            datamodule: The data; with phases an :class:`~lightning_bd.datamodules.ImageDataModule`.
            ckpt_path: Only without phases: checkpoint to resume from.
            weights_only: Only without phases: see ``Trainer.fit``.

        Raises:
            MisconfigurationException: If the run folder belongs to another run, or the data lacks what a phase needs.
        """
        if not self.phases:
            with expected_warnings():
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
        datamodule.learns_from = attackers_splits(self.phases)
        with threads(self.num_threads):  # also where a trigger is learnt: its last bits depend on them
            run = PhaseRun(
                self.phases,
                self._parents,
                model,
                datamodule,
                arguments=self._arguments,
                processes=self.num_devices * self.num_nodes,
                config=self.resolved_config,
                checkpoint_interval=self.checkpoint_interval,
                save_manifest=self.save_manifest,
                fresh=self.fresh,
                barrier=self._barrier_of_outside_launch(),
            )
            run.open_folder()
            for name in in_order(self._parents):
                run.run(name)
            run.load_last()
        if self.show_results and is_first_process():
            print_results(run.folder.results(), run.folder.root)

    def validate(  # type: ignore[override]
        self,
        model: LightningModule,
        dataloaders: EVAL_DATALOADERS | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> _EVALUATE_OUTPUT:
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
        left = self._load_checkpoint(model, datamodule, ckpt_path, weights_only)
        own = isinstance(datamodule, ImageDataModule)
        with expected_warnings():
            metrics = super().validate(model, dataloaders, left, verbose and not own, datamodule, weights_only=True)
        if own and verbose and self.is_global_zero:
            print_metrics(metrics[0])
        return metrics

    def test(  # type: ignore[override]
        self,
        model: LightningModule,
        dataloaders: EVAL_DATALOADERS | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> _EVALUATE_OUTPUT:
        """Evaluate on the test set: clean accuracy, attack success rate, robust accuracy.

        Args:
            model: The model.
            dataloaders: Instead of `datamodule`.
            ckpt_path: Checkpoint to load first, such as a run's `NN_<phase>/final.ckpt`; its own trigger is used.
            verbose: Print the metrics.
            datamodule: The data.
            weights_only: Checkpoints are always loaded with `weights_only=True`; nothing else is accepted.
        """
        left = self._load_checkpoint(model, datamodule, ckpt_path, weights_only)
        own = isinstance(datamodule, ImageDataModule)
        with expected_warnings():
            metrics = super().test(model, dataloaders, left, verbose and not own, datamodule, weights_only=True)
        if own and verbose and self.is_global_zero:
            print_metrics(metrics[0])
        return metrics

    def predict(  # type: ignore[override]
        self,
        model: LightningModule,
        dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> _PREDICT_OUTPUT | None:
        """Predict the clean test set and write `predictions.csv` into `trainer.default_root_dir`.

        Args:
            model: The model.
            dataloaders: Instead of `datamodule`.
            datamodule: The data.
            return_predictions: Whether to return the predictions of all batches.
            ckpt_path: Checkpoint to load first.
            weights_only: Checkpoints are always loaded with `weights_only=True`; nothing else is accepted.
        """
        left = self._load_checkpoint(model, datamodule, ckpt_path, weights_only)
        with expected_warnings():
            predictions = super().predict(model, dataloaders, datamodule, return_predictions, left, weights_only=True)
        if predictions and isinstance(datamodule, ImageDataModule):
            file = Path(self.default_root_dir) / f"predictions{f'_rank{self.global_rank}' * (self.world_size > 1)}.csv"
            write_predictions([tuple(batch) for batch in predictions], file)
            rank_zero_info(f"Predictions: {file}")
        return predictions

    def _barrier_of_outside_launch(self) -> Callable[[], None] | None:
        """Return how processes that something else started (torchrun, SLURM) wait for each other.

        Those that Lightning starts come later, when the first has prepared everything.
        """
        strategy = self.strategy
        environment = getattr(strategy, "cluster_environment", None)
        if self.world_size == 1 or environment is None or isinstance(environment, LightningEnvironment):
            return None
        strategy.setup_environment()
        return strategy.barrier

    def _load_checkpoint(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        path: str | Path | None,
        weights_only: bool | None,
    ) -> str | None:
        """Check a checkpoint, load its weights, take its trigger over; return what is left for Lightning to find."""
        if weights_only is False:
            raise MisconfigurationException(
                "`weights_only` False would unpickle, and so run, whatever the checkpoint holds; leave it out."
            )
        if isinstance(datamodule, ImageDataModule):
            datamodule.learns_from = attackers_splits(self.phases)
        if path is None or path in ("best", "last", "hpc"):
            return None if path is None else str(path)
        checkpoint = read_checkpoint(Path(path))
        check_weights(model, checkpoint["state_dict"], Path(path))
        if isinstance(datamodule, ImageDataModule):
            override = self.override_trigger
            if use_manifest_of(checkpoint, Path(path), datamodule, override=override) is None:
                use_trained_trigger_of(checkpoint, Path(path), datamodule, override=override)
        model.load_state_dict(checkpoint["state_dict"])
        rank_zero_info(f"Loaded the weights of {path}.")
        return None
