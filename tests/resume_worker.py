"""Runs to be killed: ``python resume_worker.py FOLDER JOBS``, or in two processes ``... FOLDER JOB ddp``.

A job is ``{"run": name, "batch": [phase, epoch, batch], ...}`` in JSON. Each job of a list gets a process of its own: a
fork of this one, which has imported everything and computed nothing.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import nn

from lightning_bd.callbacks import ElasticWeightConsolidation, FineTuning, SharpnessAwareMinimization
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import ImageFolderDataModule
from lightning_bd.phase_callbacks import SeedEachBatch
from lightning_bd.phases import MultiPhaseTrainer, Phase
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

SIZE, CLASSES, PER_CLASS = 8, 3, {"train": 32, "test": 8}


def die() -> NoReturn:
    """Kill the whole process group: this process, the other ones of the run, and its data workers."""
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("still alive")


class KillAt(Callback):
    """Dies at the start of a batch."""

    def __init__(self, phase: str, epoch: int, batch: int) -> None:
        self.place = (phase, epoch, batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        phase = Path(trainer.default_root_dir).name[3:]
        if trainer.is_global_zero and (phase, trainer.current_epoch, batch_idx) == self.place:
            die()


def kill_at_write(name: str, number: int, after: bool) -> None:
    """Die before or after the ``number``-th file called ``name``, counted from 0, gets its name."""
    rename: Callable[[Path, str | Path], Path] = Path.replace
    count = 0

    def replace(self: Path, target: str | Path) -> Path:
        nonlocal count
        due = Path(target).name == name and count == number
        if due and not after:
            die()
        moved = rename(self, target)
        if due:
            die()
        count += Path(target).name == name
        return moved

    Path.replace = replace  # type: ignore[assignment, method-assign]


def write_images(root: Path) -> None:
    """Write a folder per class, unless it is there: one bright column each, in noise."""
    if root.exists():
        return
    generator = np.random.default_rng(0)
    for part, count in PER_CLASS.items():
        for label in range(CLASSES):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
                pixels[:6, 1 + label] += 100
                Image.fromarray(pixels).save(folder / f"{number}.png")


def recipe() -> dict[str, Phase]:
    """Return phases with everything that has state: momentum, schedule, SAM, EWC, a defense, dynamic poison."""

    def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)

    sam = SharpnessAwareMinimization(variant="looksam", interval=3)
    return {
        "inject": Phase(
            split="inject", poisoned=True, max_epochs=3, optimizer=sgd, lr_scheduler=cosine, callbacks=[sam]
        ),
        "clean": Phase(
            split="consolidate", max_epochs=2, optimizer=sgd, callbacks=[ElasticWeightConsolidation(strength=0.1)]
        ),
        "defend": Phase(
            split="defend", max_epochs=2, optimizer=sgd, callbacks=[FineTuning([0.02], max_drop=1.0, max_epochs=1)]
        ),
    }


def network() -> nn.Module:
    """Return a small network with batch normalisation and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveMaxPool2d(4), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(64, CLASSES),
    )  # fmt: skip


def run(folder: Path, job: dict[str, Any], ddp: bool = False) -> None:
    """Do one job: start a run or go on with it, and perhaps die."""
    callbacks: list[Callback] = []
    if "batch" in job:
        callbacks = [KillAt(*job["batch"])]
    if "write" in job:
        kill_at_write(*job["write"])
    if job.get("unseeded"):
        SeedEachBatch.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]
    data = ImageFolderDataModule(
        folder / "images", SIZE, poison=Poison(BadNets(2, pattern="white"), rate=0.3), batch_size=8, seed=5,
        splits={"inject": 0.5, "consolidate": 0.25, "defend": 0.25}, num_workers=job.get("workers", 0),
        in_memory=job.get("in_memory", True),
    )  # fmt: skip
    trainer = MultiPhaseTrainer(
        phases=recipe(), default_root_dir=folder / job["run"], accelerator="cpu", logger=False, callbacks=callbacks,
        enable_progress_bar=False, devices=2 if ddp else 1, strategy="ddp" if ddp else "auto", num_threads=1,
    )  # fmt: skip
    trainer.show_results = False
    trainer.fit(BackdoorClassifier(network(), CLASSES), datamodule=data)


def fork(folder: Path, job: dict[str, Any]) -> int:
    """Do a job in a child of this process; return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            run(folder, job)
            status = 0
        except Exception:
            logging.exception("The job failed.")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    place, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    if sys.argv[3:] == ["ddp"]:
        run(place, jobs, ddp=True)
    else:
        write_images(place / "images")
        statuses = [fork(place, job) for job in jobs]
        (place / "statuses.json").write_text(json.dumps(statuses))
