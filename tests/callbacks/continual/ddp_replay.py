"""Two processes train with replay callbacks under DDP; the first writes the results. Run by the test beside it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.continual.averaged_gradient_episodic_memory import AveragedGradientEpisodicMemory
from lightning_bd.callbacks.continual.dark_experience_replay import DarkExperienceReplay
from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay

CAPACITY, BATCH_SIZE, STRENGTH, ALPHA, BETA = 10, 6, 0.7, 0.6, 0.3


def make_dark(insert_current: bool) -> Callback:
    return DarkExperienceReplay(ALPHA, BETA, CAPACITY, BATCH_SIZE, insert_current=insert_current)


CASES: dict[str, tuple[Callable[[], Callback], int, dict[str, Any]]] = {
    "a-gem": (lambda: AveragedGradientEpisodicMemory(CAPACITY, BATCH_SIZE), 1, {"find_unused_parameters": True}),
    "a-gem accumulated": (
        lambda: AveragedGradientEpisodicMemory(CAPACITY, BATCH_SIZE), 2, {"gradient_as_bucket_view": True},
    ),
    "replay": (lambda: ExperienceReplay(STRENGTH, CAPACITY, BATCH_SIZE), 2, {}),
    "dark": (lambda: make_dark(False), 1, {"gradient_as_bucket_view": True}),
    "dark inserting": (lambda: make_dark(True), 1, {}),
}  # fmt: skip


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def make_batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Twelve batches of four; process r takes batches r, r + 2, ..."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(12, 4, 6, generator=generator)
    return list(zip(images, torch.randint(3, (12, 4), generator=generator), strict=True))


class Data(LightningDataModule):
    """The second process has fewer samples of the previous task."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        assert self.trainer is not None
        images, labels = zip(*make_batches(1)[self.trainer.global_rank :: 2], strict=True)
        return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=4)

    def reference_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.trainer is not None
        yield from make_batches(2)[9:] if self.trainer.global_rank else make_batches(2)[:9]


class RemembersFirstBuffer(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        [replay] = [c for c in trainer.callbacks if "buffer" in c.state_dict()]  # type: ignore[attr-defined]
        self.buffer = {k: v.clone() if isinstance(v, Tensor) else v for k, v in replay.state_dict()["buffer"].items()}


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, (make_callback, accumulate, options) in CASES.items():
        callback, first, module = make_callback(), RemembersFirstBuffer(), Module()
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo", **options), max_epochs=1,
            accumulate_grad_batches=accumulate, callbacks=[callback, first], use_distributed_sampler=False,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=Data())
        buffer = callback.state_dict()["buffer"]
        parts = [*module.net.parameters(), *(value for value in buffer.values() if isinstance(value, Tensor))]
        everywhere = trainer.strategy.all_gather(torch.cat([part.detach().flatten().float() for part in parts]))
        assert isinstance(everywhere, Tensor)
        results[name] = {
            "state": module.net.state_dict(),
            "first": first.buffer,
            "buffer": buffer,
            "apart": (everywhere[0] - everywhere[1]).abs().max(),
            "logged": sorted(trainer.callback_metrics),
        }
    if trainer.global_rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
