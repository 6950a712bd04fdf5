"""A run of two processes: ``python ddp_worker.py FOLDER KIND``; each writes the trigger that it is left with."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lightning_bd.attacks import LIRA, InputAware
from lightning_bd.backbones import small_cnn
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import InputAwareTrigger, LIRATrigger, Trigger


def main(folder: Path, kind: str) -> None:
    """Train one epoch, and save weights and batches."""
    torch.manual_seed(0)
    backbone = small_cnn(10, 1, width=4)
    trigger: Trigger = InputAwareTrigger(width=4, depth=1)
    model: BackdoorClassifier = InputAware(backbone, 10, mask_epochs=1)
    if kind == "lira":
        trigger, model = LIRATrigger(0.3, width=4, depth=1), LIRA(backbone, 10, generator_lr=0.01)
    # A rate at which some processes have no triggered image in some batches.
    poison = Poison(trigger, rate=0.1, target=0, cover_rate=0.0 if kind == "lira" else 0.05)
    data = DigitsDataModule(poison, subset=96, test_subset=40, batch_size=6, seed=3)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    counts = [
        0 if raw.poison_rows is None else len(raw.poison_rows) for raw in data.train_dataloader()
    ]  # fmt: skip
    state = {"trigger": trigger.state_dict(), "model": model.state_dict(), "counts": counts}
    torch.save(state, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
