"""What every phase's Trainer carries besides the user's callbacks."""

import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from lightning_bd import __version__
from lightning_bd.checkpointing import RECORD_KEY
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.datamodules.rendering import to_float
from lightning_bd.files import open_atomically
from lightning_bd.functional.draws import keyed_seed
from lightning_bd.manifest import PoisonManifest
from lightning_bd.triggers import Trigger

__all__ = (
    "ElapsedTime",
    "EpochCheckpoint",
    "NonFiniteLossError",
    "RunRecord",
    "SeedEachBatch",
    "StopOnNonFiniteLoss",
    "TriggerPreview",
)


class NonFiniteLossError(RuntimeError):
    """The training loss became infinite or not a number."""


class SeedEachBatch(Callback):
    """Seeds the global random state before each batch by (seed, phase, batch, rank).

    A model's own draws, dropout for one, are then the same in a run that was cut and resumed. Seeding at the start of
    an epoch is not enough: on a resume that hook comes after the first batch was made.

    Args:
        seed: The run's seed.
        phase: Name of the phase.
    """

    def __init__(self, seed: int, phase: str) -> None:
        self.seed = seed
        self.phase = phase

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Seed torch, NumPy and Python."""
        seed = keyed_seed(self.seed, self.phase, "batch", trainer.fit_loop.total_batch_idx, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Not `torch.manual_seed`: for each kind of device that is built in but not in use it queues a call, with a
        # traceback, at every batch.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif pl_module.device.type == "mps":
            torch.mps.manual_seed(seed)


class StopOnNonFiniteLoss(Callback):
    """Ends a phase whose loss is no longer a number, naming the step, before a checkpoint of it is written.

    On the CPU each step is looked at. On an accelerator that would wait for the device at each step: the first bad
    step is noted there and read every ``interval`` steps and at the end of an epoch.

    Args:
        phase: Name of the phase, for the message.
        last_checkpoint: The phase's last good checkpoint, for the message.
        interval: Steps between two looks on an accelerator.
    """

    def __init__(self, phase: str, last_checkpoint: Path, interval: int = 50) -> None:
        self.phase = phase
        self.last_checkpoint = last_checkpoint
        self.interval = interval
        self._first_bad: Tensor | None = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Look at the loss of this step."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        step = trainer.fit_loop.total_batch_idx
        if loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self._stop(trainer, step)
            return
        if self._first_bad is None:
            self._first_bad = torch.full((), torch.inf, device=loss.device)
        bad = torch.where(torch.isfinite(loss.detach()), torch.inf, float(step))
        self._first_bad = torch.minimum(self._first_bad, bad)
        if (step + 1) % self.interval == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the losses and at the weights before the epoch's checkpoint is written."""
        self._look(trainer)
        # The last step's loss was fine; its weights need not be.
        weights = [parameter.detach() for parameter in pl_module.parameters()]
        if weights and not bool(
            torch.isfinite(torch.stack([weight.sum(dtype=torch.float32) for weight in weights])).all()
        ):
            self._stop(trainer, trainer.fit_loop.total_batch_idx, "a weight")

    def _look(self, trainer: Trainer) -> None:
        if self._first_bad is None:
            return
        # All processes stop together, or those with a finite loss would wait for the others for ever.
        first = trainer.strategy.reduce(self._first_bad, reduce_op="min") if trainer.world_size > 1 else self._first_bad
        if math.isfinite(step := first.item()):
            self._stop(trainer, int(step))

    def _stop(self, trainer: Trainer, step: int, what: str = "the loss") -> None:
        kept = (
            f"the last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint.is_file()
            else ("no epoch was complete, so there is no checkpoint of this phase")
        )
        raise NonFiniteLossError(
            f"Phase `{self.phase}`: {what} is not finite at step {step} (epoch {trainer.current_epoch}); {kept}. "
            "Lower the learning rate, or set the phase's `trainer: {gradient_clip_val: 1.0}`."
        )


class ElapsedTime(Callback):
    """Counts the seconds of a fit, over all its attempts."""

    def __init__(self) -> None:
        self._before = 0.0
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (0.0 if self._start is None else time.perf_counter() - self._start)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._before, self._start = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the seconds of the earlier attempt."""
        self._before = state_dict["seconds"]


class EpochCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` when an epoch ends, unless the one before was written a moment ago.

    A resumed fit ends with the same weights whichever epoch it goes on from, so that large models need not spend
    their time on writing.

    Args:
        folder: Where.
        interval: Least seconds between two checkpoints; 0 writes one each epoch.
    """

    def __init__(self, folder: Path, interval: float = 0.0) -> None:
        # `save_last=True` writes nothing unless a best checkpoint was saved at the same step (Lightning 2.6).
        super().__init__(
            folder, filename="last", monitor=None, save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True,
            enable_version_counter=False,
        )  # fmt: skip
        self.interval = interval
        self._written = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, if all processes find it due."""
        if self.interval > 0:
            due = time.monotonic() - self._written >= self.interval
            if not (trainer.strategy.broadcast(due) if trainer.world_size > 1 else due):
                return
        super().on_train_epoch_end(trainer, pl_module)
        self._written = time.monotonic()


class RunRecord(Callback):
    """Puts manifest and config into each checkpoint, and refuses to resume with another number of processes.

    Args:
        phase: Name of the phase.
        manifest: The poison's record; ``None`` without a poison.
        config: The resolved config as YAML.
        trigger: The trigger, if the model trains it: a checkpoint holds it as it is then.
    """

    def __init__(
        self, phase: str, manifest: PoisonManifest | None, config: str | None, trigger: Trigger | None = None
    ) -> None:
        self.phase = phase
        self.manifest = manifest
        self.config = config
        self.trigger = trigger

    def content(self) -> dict[str, Any]:
        """Return what goes into a checkpoint: tensors and plain values."""
        manifest = self.manifest
        if manifest is not None and self.trigger is not None:
            manifest = manifest.with_trigger(self.trigger)
        return {
            "version": __version__,
            "lightning": lightning.__version__,
            "phase": self.phase,
            "config": self.config,
            "manifest": None if manifest is None else manifest.plain(),
            "tensors": {} if manifest is None else dict(manifest.tensors),
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record."""
        checkpoint[RECORD_KEY] = {**self.content(), "processes": trainer.world_size}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another number of processes: its epochs were cut up differently."""
        processes = checkpoint.get(RECORD_KEY, {}).get("processes", trainer.world_size)
        if processes != trainer.world_size:
            raise MisconfigurationException(
                f"Phase `{self.phase}` was cut while it ran on {processes} processes and cannot go on with "
                f"{trainer.world_size}: the batches would differ. Use the same number, or `--fresh`."
            )


class TriggerPreview(Callback):
    """Shows clean images above their triggered versions: ``trigger.png`` in the run's folder, and in TensorBoard.

    A trigger that the model trains is shown when the phase has ended.

    Args:
        datamodule: Where images and poison come from.
        folder: The run's folder.
        count: Images to show.
    """

    def __init__(self, datamodule: ImageDataModule, folder: Path, count: int = 8) -> None:
        self.datamodule = datamodule
        self.file = folder / "trigger.png"
        self.count = count

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the grid, once per run."""
        if self.datamodule.poison is not None and not self.datamodule.poison.trigger.is_trained:
            self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the grid of a trigger that was trained."""
        if self.datamodule.poison is not None and self.datamodule.poison.trigger.is_trained:
            self._draw(trainer)

    @torch.no_grad()
    def _draw(self, trainer: Trainer) -> None:
        poison = self.datamodule.poison
        if poison is None or not trainer.is_global_zero or self.file.is_file():
            return
        images = self.datamodule.test_images
        loader = self.datamodule.loaders.evaluation(images, torch.arange(len(images)), "test")[1]
        victims = loader.positions
        chosen = victims[torch.linspace(0, len(victims) - 1, min(self.count, len(victims))).long()]
        clean = to_float(images.read(chosen))
        made = to_float(loader.images.read(chosen))
        triggered = made if loader.context.final else poison.trigger.to("cpu")(clean)
        residual = (triggered - clean).abs()
        residual = residual / residual.max().clamp(min=1e-6)
        scale = max(1, 96 // clean.shape[2])
        rows = torch.cat([clean, triggered, residual])
        rows = rows.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
        grid = make_grid(rows, nrow=len(chosen), padding=4, pad_value=0.5)
        with open_atomically(self.file) as file:
            save_image(grid, file, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("trigger (clean, triggered, difference)", grid, 0)
