"""Two processes train with every method under DDP; the first writes the results. Run by conftest's fixture."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.batch import Sample
from lightning_bd.callbacks.continual.anchoring import Anchoring
from lightning_bd.callbacks.continual.averaged_gradient_episodic_memory import AveragedGradientEpisodicMemory
from lightning_bd.callbacks.continual.dark_experience_replay import DarkExperienceReplay
from lightning_bd.callbacks.continual.elastic_weight_consolidation import ElasticWeightConsolidation
from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay
from lightning_bd.callbacks.continual.learning_without_forgetting import LearningWithoutForgetting
from lightning_bd.callbacks.continual.memory_aware_synapses import MemoryAwareSynapses
from lightning_bd.callbacks.continual.quadratic_regularizer import QuadraticRegularizer
from lightning_bd.callbacks.continual.synaptic_intelligence import SynapticIntelligence
from lightning_bd.callbacks.flatness.sharpness_aware_minimization import SharpnessAwareMinimization

CAPACITY, BATCH_SIZE, REPLAY, ALPHA, BETA = 10, 6, 0.7, 0.6, 0.3
TERMS, EWC, MAS, SI = 2.0, 5.0, 0.1, 2.0


@dataclass(frozen=True)
class Case:
    """Callbacks, the first of which may remember something; batches of a step, the fits' data, the module, DDP."""

    make: Callable[[], list[Callback]]
    accumulate: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1,)
    lr: float = 0.1
    rho: float = 0.0
    calls_itself: bool = True
    num_samples: int | None = None


def consolidation(accumulate: int, num_samples: int | None, options: dict[str, Any]) -> Case:
    return Case(
        lambda: [ElasticWeightConsolidation(EWC, num_samples=num_samples)], accumulate, options, num_samples=num_samples
    )


def terms(calls_itself: bool, accumulate: int, rho: float, options: dict[str, Any]) -> Case:
    return Case(
        lambda: [Anchoring(TERMS), SharpnessAwareMinimization(rho), LearningWithoutForgetting(TERMS)],
        accumulate, options, rho=rho, calls_itself=calls_itself,
    )  # fmt: skip


def gradients(accumulate: int, options: dict[str, Any]) -> Case:
    return Case(lambda: [AveragedGradientEpisodicMemory(CAPACITY, BATCH_SIZE)], accumulate, options, lr=0.5)


def dark(insert_current: bool, options: dict[str, Any]) -> Case:
    return Case(
        lambda: [DarkExperienceReplay(ALPHA, BETA, CAPACITY, BATCH_SIZE, insert_current=insert_current)],
        options=options, lr=0.5,
    )  # fmt: skip


VIEW, UNUSED = {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}
CASES = {
    "ewc": consolidation(1, None, {}),
    "ewc accumulated": consolidation(2, 7, VIEW),
    "ewc, unused parameters": consolidation(2, None, UNUSED),
    "mas": Case(lambda: [MemoryAwareSynapses(MAS)], 2),
    "si": Case(lambda: [SynapticIntelligence(SI)], 2, seeds=(1, 3)),
    "terms": terms(True, 1, 0.0, {}),
    "terms, called again": terms(False, 1, 0.0, {"static_graph": True}),
    "terms with SAM": terms(True, 2, 0.1, VIEW),
    "a-gem": gradients(1, UNUSED),
    "a-gem accumulated": gradients(2, VIEW),
    "replay": Case(lambda: [ExperienceReplay(REPLAY, CAPACITY, BATCH_SIZE)], 2, lr=0.5),
    "dark": dark(False, VIEW),
    "dark inserting": dark(True, {}),
}


class Module(LightningModule):
    def __init__(self, lr: float = 0.1, calls_itself: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.lr, self.calls_itself = lr, calls_itself
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
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def make_batches(seed: int) -> list[Sample]:
    """Twelve batches of four; process r takes batches r, r + 2, ... The first is all poisoned."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(12, 4, 6, generator=generator)
    labels = torch.randint(3, (12, 4), generator=generator)
    is_poisoned = torch.rand(12, 4, generator=generator) < 0.4
    is_poisoned[0] = True
    return [Sample(*row, row[1], torch.arange(4)) for row in zip(images, labels, is_poisoned, strict=True)]


class Data(LightningDataModule):
    """The second process has fewer samples of the previous task."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        assert self.trainer is not None
        columns = zip(*make_batches(self.seed)[self.trainer.global_rank :: 2], strict=True)
        return DataLoader(TensorDataset(*(torch.cat(column) for column in columns)), batch_size=4)

    def reference_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.trainer is not None
        share = slice(9, None) if self.trainer.global_rank else slice(9)
        yield from ((batch.image, batch.label) for batch in make_batches(2)[share])


def remembered(callback: Callback) -> dict[str, Any]:
    """What all processes must hold alike: what a later fit builds on, or the buffer."""
    if isinstance(callback, QuadraticRegularizer):
        return dict(callback.carried_state()["carried"])
    buffer = callback.state_dict().get("buffer", {})
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in buffer.items()}


class RemembersTheStart(Callback):
    memory: dict[str, Any]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memory = remembered(trainer.callbacks[0])  # type: ignore[attr-defined]


def run(case: Case) -> tuple[Trainer, dict[str, Any]]:
    module, callbacks, start = Module(case.lr, case.calls_itself), case.make(), RemembersTheStart()
    for seed in case.seeds:
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo", **case.options),
            max_epochs=1, accumulate_grad_batches=case.accumulate, callbacks=[*callbacks, start],
            use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=Data(seed))
    memory = remembered(callbacks[0])
    parts = [*module.net.parameters(), *(value for value in memory.values() if isinstance(value, Tensor))]
    everywhere = trainer.strategy.all_gather(torch.cat([part.detach().flatten().float() for part in parts]))
    assert isinstance(everywhere, Tensor)
    return trainer, {
        "state": module.net.state_dict(),
        "start": start.memory,
        "memory": memory,
        "apart": (everywhere[0] - everywhere[1]).abs().max(),
        "calls": module.calls,
        "logged": dict(trainer.callback_metrics),
    }


def main(folder: Path) -> None:
    results = {}
    for name, case in CASES.items():
        trainer, results[name] = run(case)
    if trainer.global_rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
