"""Two processes train with EWC, MAS and SI under DDP; the first writes the results. Run by the test beside it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks import ElasticWeightConsolidation
from lightning_bd.callbacks.continual.memory_aware_synapses import MemoryAwareSynapses
from lightning_bd.callbacks.continual.quadratic_regularizer import QuadraticRegularizer
from lightning_bd.callbacks.continual.synaptic_intelligence import SynapticIntelligence

CASES: dict[str, tuple[int, int | None, dict[str, Any]]] = {
    "plain": (1, None, {}),
    "accumulated": (2, 7, {"gradient_as_bucket_view": True}),
    "unused parameters": (2, None, {"find_unused_parameters": True}),
}
STRENGTH = 5.0
#: Strength; the seeds of the tasks' data, one fit each.
OTHERS: dict[str, tuple[float, tuple[int, ...]]] = {"mas": (0.1, (1,)), "si": (2.0, (1, 3))}


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
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Twelve batches of four; process r takes batches r, r + 2, ..."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(12, 4, 6, generator=generator)
    return list(zip(images, torch.randint(3, (12, 4), generator=generator), strict=True))


class Data(LightningDataModule):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.seed = seed

    def shard(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        assert self.trainer is not None
        return make_batches(seed)[self.trainer.global_rank :: 2]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        images, labels = zip(*self.shard(self.seed), strict=True)
        return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=4)

    def reference_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.shard(2)


def fit(callback: QuadraticRegularizer, module: Module, seed: int = 1, accumulate: int = 1, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo", **options), max_epochs=1,
        accumulate_grad_batches=accumulate, callbacks=[callback], use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(seed))
    return trainer


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, (accumulate, num_samples, options) in CASES.items():
        callback = ElasticWeightConsolidation(strength=STRENGTH, num_samples=num_samples)
        module = Module()
        trainer = fit(callback, module, accumulate=accumulate, **options)
        fisher = callback.state_dict()["fisher"]
        vector = torch.cat([tensor.detach().flatten() for tensor in [*module.net.parameters(), *fisher.values()]])
        everywhere = trainer.strategy.all_gather(vector)
        assert isinstance(everywhere, Tensor)
        results[name] = {
            "state": module.net.state_dict(),
            "fisher": fisher,
            "apart": (everywhere[0] - everywhere[1]).abs().max(),
            "penalty": trainer.callback_metrics["ewc/penalty"],
        }
    for name, (strength, seeds) in OTHERS.items():
        other = MemoryAwareSynapses(strength) if name == "mas" else SynapticIntelligence(strength)
        module = Module()
        for seed in seeds:
            trainer = fit(other, module, seed, accumulate=2)
        carried = other.carried_state()["carried"]
        vector = torch.cat([tensor.detach().flatten() for tensor in [*module.net.parameters(), *carried.values()]])
        everywhere = trainer.strategy.all_gather(vector)
        assert isinstance(everywhere, Tensor)
        results[name] = {
            "state": module.net.state_dict(),
            "carried": carried,
            "apart": (everywhere[0] - everywhere[1]).abs().max(),
        }
    if trainer.global_rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
