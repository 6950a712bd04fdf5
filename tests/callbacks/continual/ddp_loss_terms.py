"""Two processes train with loss terms under DDP; the first writes the results. Run by the test beside it."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.batch import Sample
from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.callbacks.continual.anchoring import Anchoring
from lightning_bd.callbacks.continual.learning_without_forgetting import LearningWithoutForgetting

STRENGTH = 2.0
# Whether `training_step` calls the module itself, accumulated batches, SAM's rho, options of DDP.
CASES: dict[str, tuple[bool, int, float, dict[str, Any]]] = {
    "plain": (True, 1, 0.0, {}),
    "called again": (False, 1, 0.0, {"static_graph": True}),
    "with SAM": (True, 2, 0.1, {"gradient_as_bucket_view": True}),
}


class Module(LightningModule):
    def __init__(self, calls_itself: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.calls_itself = calls_itself
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        logits: Tensor = self.net(x)
        return logits

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> Sample:
        return Sample(*batch)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        logits = self(batch.image) if self.calls_itself else self.net(batch.image)
        return F.cross_entropy(logits, batch.label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_batches() -> list[Sample]:
    """Twelve batches of four; process r takes batches r, r + 2, ... The first is all poisoned."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 4, 6, generator=generator)
    labels = torch.randint(3, (12, 4), generator=generator)
    is_poisoned = torch.rand(12, 4, generator=generator) < 0.4
    is_poisoned[0] = True
    return [Sample(*row, row[1], torch.arange(4)) for row in zip(images, labels, is_poisoned, strict=True)]


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        assert self.trainer is not None
        columns = zip(*make_batches()[self.trainer.global_rank :: 2], strict=True)
        return DataLoader(TensorDataset(*(torch.cat(column) for column in columns)), batch_size=4)


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, (calls_itself, accumulate, rho, options) in CASES.items():
        module = Module(calls_itself)
        callbacks: list[Callback] = [
            Anchoring(STRENGTH), SharpnessAwareMinimization(rho), LearningWithoutForgetting(STRENGTH)
        ]  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo", **options), max_epochs=1,
            accumulate_grad_batches=accumulate, callbacks=callbacks, use_distributed_sampler=False, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=Data())
        vector = torch.cat([p.detach().flatten() for p in module.net.parameters()])
        everywhere = trainer.strategy.all_gather(vector)
        assert isinstance(everywhere, Tensor)
        results[name] = {
            "state": module.net.state_dict(),
            "apart": (everywhere[0] - everywhere[1]).abs().max(),
            "calls": module.calls,
        }
    if trainer.global_rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
