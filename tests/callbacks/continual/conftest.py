"""The methods of continual learning, each with what it must equal in plain PyTorch, and their run in two processes."""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bd.batch import Sample
from lightning_bd.callbacks.continual.anchoring import Anchoring
from lightning_bd.callbacks.continual.averaged_gradient_episodic_memory import AveragedGradientEpisodicMemory
from lightning_bd.callbacks.continual.dark_experience_replay import DarkExperienceReplay
from lightning_bd.callbacks.continual.elastic_weight_consolidation import ElasticWeightConsolidation
from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay
from lightning_bd.callbacks.continual.learning_without_forgetting import LearningWithoutForgetting
from lightning_bd.callbacks.continual.memory_aware_synapses import MemoryAwareSynapses
from lightning_bd.callbacks.continual.replay_buffer import BufferBatch, ReplayBuffer
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.fisher import FisherKind, fisher_diagonal

if TYPE_CHECKING:
    from tests.callbacks.conftest import At, Batch, Lab, Module, Settings


#: The previous task, where a test names no other data.
DEFAULT: Iterable[Any] = ()


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


class Draws(list["Batch"]):
    """Data of the previous task whose reading draws from all random streams."""

    def __iter__(self) -> Iterator[Batch]:
        random.random()
        np.random.rand()
        torch.rand(())
        return super().__iter__()


@dataclass
class Run:
    """A loop by hand: its net, its scaler, and the penalty of each batch or whether each step was projected."""

    net: nn.Module
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    notes: list[float] = field(default_factory=list)


class Method:
    """A callback, the module and data that it is tested with, and its loop by hand."""

    name: ClassVar[str]
    lr: ClassVar[float] = 0.05
    uniform: ClassVar[bool] = False
    atol: ClassVar[float] = 1e-6
    #: In float16 with SAM.
    half_atol: ClassVar[float] = 1e-5

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def callback(self) -> Callback:
        raise NotImplementedError

    def resumed(self) -> Callback:
        """One that has only its checkpoint to go on from."""
        return self.callback()

    def faint(self, strength: float) -> Callback:
        """A strength that changes no weight, or 0."""
        raise NotImplementedError

    def by_hand(self, settings: Settings | None = None) -> Run:
        raise NotImplementedError

    def batches(self) -> list[Batch]:
        return self.lab.batches(1, self.uniform)

    def old_task(self) -> list[Batch]:
        return self.lab.batches(2, self.uniform)

    def loader(self, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return self.lab.loader(self.batches(), shuffle)

    def datamodule(self) -> PreviousTask:
        return PreviousTask(self.loader(), self.old_task())

    def module(self, *hooks: type[LightningModule], **options: Any) -> Module:
        return self.lab.module(*hooks, **{"lr": self.lr, **options})


class MakesSamples(LightningModule):
    """Its batches tell what is poisoned."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> Sample:
        return Sample(*batch)


class AnchoringMethod(Method):
    name = "anchoring"
    strength = 5.0

    def callback(self) -> Anchoring:
        return Anchoring(self.strength)

    def faint(self, strength: float) -> Anchoring:
        return Anchoring(strength)

    def batches(self) -> list[Batch]:
        """The third is all poisoned, the fifth all clean."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(5, 8, 1, 6, 6, generator=generator)
        labels = torch.randint(3, (5, 8), generator=generator)
        is_poisoned = torch.rand(5, 8, generator=generator) < 0.4
        is_poisoned[2], is_poisoned[4] = True, False
        return list(zip(images, labels, is_poisoned, labels, torch.arange(40).view(5, 8), strict=True))

    def module(self, *hooks: type[LightningModule], **options: Any) -> Module:
        return super().module(*hooks, MakesSamples, **options)

    def penalty(self, logits: Tensor, anchor: Tensor, clean: list[int]) -> Tensor:
        """The formula, sample by sample."""
        terms = [((logits[i].float().softmax(0) - anchor[i].float().softmax(0)) ** 2).sum() for i in clean]
        return torch.as_tensor(self.strength * sum(terms, torch.zeros(())) / max(len(terms), 1))

    def by_hand(self, settings: Settings | None = None, clean_only: bool = True) -> Run:
        run = Run(self.lab.net())
        anchor = copy.deepcopy(run.net).eval()

        def loss(batch: Batch, at: At) -> Tensor:
            clean = [i for i in range(8) if not (clean_only and batch[2][i])]
            logits = run.net(batch[0])
            term = self.penalty(logits, anchor(batch[0]).detach(), clean)
            run.notes.append(float(term.detach()))
            return torch.as_tensor(F.cross_entropy(logits, batch[1]) + term)

        run.scaler = self.lab.by_hand(run.net, self.batches(), loss, settings, lr=self.lr)
        return run


class DistillationMethod(Method):
    name = "lwf"
    lr = 0.1
    strength, temperature = 2.0, 3.0

    def callback(self) -> LearningWithoutForgetting:
        return LearningWithoutForgetting(self.strength, self.temperature)

    def faint(self, strength: float) -> LearningWithoutForgetting:
        return LearningWithoutForgetting(strength)

    def by_hand(self, settings: Settings | None = None) -> Run:
        """The paper's cross-entropy of softened probabilities, less the teacher's entropy, times the factor."""
        run = Run(self.lab.net())
        teacher = copy.deepcopy(run.net).eval()

        def loss(batch: Batch, at: At) -> Tensor:
            logits = run.net(batch[0])
            targets = (teacher(batch[0]).detach().float() / self.temperature).softmax(1)
            cross_entropy = F.cross_entropy(logits.float() / self.temperature, targets)
            entropy = -(targets * targets.log()).sum(1).mean()
            term = self.strength * self.temperature**2 * (cross_entropy - entropy)
            run.notes.append(float(term.detach()))
            return torch.as_tensor(F.cross_entropy(logits, batch[1]) + term)

        run.scaler = self.lab.by_hand(run.net, self.batches(), loss, settings, lr=self.lr)
        return run


class QuadraticMethod(Method):
    """A penalty on leaving the weights that the fit starts at."""

    strength: ClassVar[float]

    def penalty(self, net: nn.Module, importance: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
        """The formula, for autograd."""
        terms = [(importance[name] * (p - anchor[name]) ** 2).sum() for name, p in net.named_parameters()]
        return torch.as_tensor(self.strength * torch.stack(terms).sum())

    def regularized(self, net: nn.Module, importance: dict[str, Tensor], settings: Settings | None) -> Run:
        anchor = {name: p.detach().clone() for name, p in net.named_parameters()}

        def loss(batch: Batch, at: At) -> Tensor:
            return F.cross_entropy(net(batch[0]), batch[1]) + self.penalty(net, importance, anchor)

        return Run(net, self.lab.by_hand(net, self.batches(), loss, settings, lr=self.lr))


class ConsolidationMethod(QuadraticMethod):
    name = "ewc"
    strength = 3.0

    def callback(self, strength: float = strength, **arguments: Any) -> ElasticWeightConsolidation:
        return ElasticWeightConsolidation(strength, **{"dataloader": self.old_task(), **arguments})

    def resumed(self) -> ElasticWeightConsolidation:
        return ElasticWeightConsolidation(self.strength)

    def faint(self, strength: float) -> ElasticWeightConsolidation:
        return ElasticWeightConsolidation(strength, "sampled", dataloader=Draws(self.old_task()) if strength else None)

    def by_hand(self, settings: Settings | None = None, kind: FisherKind = "empirical") -> Run:
        net = self.lab.net()
        return self.regularized(net, fisher_diagonal(net, self.old_task(), kind), settings)


class SynapsesMethod(QuadraticMethod):
    name = "mas"
    strength = 4.0

    def callback(self, strength: float = strength, **arguments: Any) -> MemoryAwareSynapses:
        return MemoryAwareSynapses(strength, **{"dataloader": self.old_task(), **arguments})

    def resumed(self) -> MemoryAwareSynapses:
        return MemoryAwareSynapses(self.strength)

    def faint(self, strength: float) -> MemoryAwareSynapses:
        return MemoryAwareSynapses(strength, dataloader=Draws(self.old_task()) if strength else None)

    def definition(self, net: nn.Module, count: int = 40) -> dict[str, Tensor]:
        """Mean over samples of the absolute gradient of the squared norm of the logits."""
        net = copy.deepcopy(net).eval()
        samples = torch.cat([images for images, _ in self.old_task()])[:count]
        sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for x in samples:
            gradients = torch.autograd.grad(net(x[None]).square().sum(), list(net.parameters()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.abs()
        return {name: total / len(samples) for name, total in sums.items()}

    def by_hand(self, settings: Settings | None = None) -> Run:
        net = self.lab.net()
        return self.regularized(net, self.definition(net), settings)


class PreviousTask(LightningDataModule):
    """A datamodule that replays the previous task."""

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]], old_task: list[Batch]) -> None:
        super().__init__()
        self.loader, self.old_task = loader, old_task
        self.asked: list[tuple[torch.device, bool]] = []

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader

    def reference_batches(self, device: torch.device, clean: bool = False) -> Iterator[tuple[Tensor, Tensor, str]]:
        self.asked.append((device, clean))
        for images, labels in self.old_task:
            yield images.to(device), labels.to(device), "what else a batch may hold"


class ReplayMethod(Method):
    """One that remembers samples of the previous task."""

    lr = 0.1
    uniform = True
    capacity, batch_size = 12, 6

    def filled(self) -> ReplayBuffer:
        buffer = ReplayBuffer(self.capacity)
        for batch in self.old_task():
            buffer.insert(*batch)
        return buffer

    def draw(self, buffer: ReplayBuffer, kind: str, *key: int) -> BufferBatch:
        return buffer.sample(self.batch_size, keyed_generator(0, kind, *key))


class GradientMemoryMethod(ReplayMethod):
    name = "a-gem"

    def callback(
        self, capacity: int = 12, batch_size: int = 6, dataloader: Iterable[Any] | None = DEFAULT, seed: int = 0
    ) -> AveragedGradientEpisodicMemory:
        data = self.old_task() if dataloader is DEFAULT else dataloader
        return AveragedGradientEpisodicMemory(capacity, batch_size, data, seed=seed)

    def resumed(self) -> AveragedGradientEpisodicMemory:
        return self.callback(dataloader=None)

    def by_hand(self, settings: Settings | None = None) -> Run:
        """Notes which steps were projected."""
        run, buffer = Run(self.lab.net()), self.filled()
        parameters = list(run.net.parameters())

        def loss(batch: Batch | BufferBatch, at: At | None = None) -> Tensor:
            return F.cross_entropy(run.net(batch[0]), batch[1])

        def project(step: int, scale: float) -> None:
            buffers = [b.clone() for b in run.net.buffers()]
            with settings.autocast() if settings is not None else torch.enable_grad():
                value = loss(self.draw(buffer, "a_gem", step, 0))
            r = flat(torch.autograd.grad(value * scale, parameters)) / scale
            for now, before in zip(run.net.buffers(), buffers, strict=True):
                now.copy_(before)
            g = flat(p.grad for p in parameters)
            run.notes.append(bool(g @ r < 0))
            if run.notes[-1] and g.isfinite().all() and r.isfinite().all():
                g = g - (g @ r) / (r @ r) * r
                for p, part in zip(parameters, torch.split(g, [p.numel() for p in parameters]), strict=True):
                    p.grad = part.view_as(p).clone()

        run.scaler = self.lab.by_hand(run.net, self.batches(), loss, settings, project, lr=self.lr)
        return run


class ExperienceMethod(ReplayMethod):
    name = "experience replay"
    strength = 0.7

    def callback(
        self,
        strength: float = strength,
        dataloader: Iterable[Any] | None = DEFAULT,
        insert_current: bool = False,
        seed: int = 0,
    ) -> ExperienceReplay:
        data = self.old_task() if dataloader is DEFAULT else dataloader
        return ExperienceReplay(
            strength, self.capacity, self.batch_size, data, insert_current=insert_current, seed=seed
        )

    def resumed(self) -> ExperienceReplay:
        return self.callback(dataloader=None)

    def faint(self, strength: float) -> ExperienceReplay:
        return self.callback(strength, Draws(self.old_task()), insert_current=True)

    def by_hand(self, settings: Settings | None = None, insert_current: bool = False) -> Run:
        """On the new batch and one of the buffer."""
        net, buffer = self.lab.net(), self.filled()

        def loss(batch: Batch, at: At) -> Tensor:
            drawn = self.draw(buffer, "experience_replay", at.step, at.position, 0)
            value = F.cross_entropy(net(batch[0]), batch[1])
            return value + self.strength * F.cross_entropy(net(drawn.images), drawn.labels)

        after = (lambda batch: buffer.insert(*batch)) if insert_current else None
        return Run(net, self.lab.by_hand(net, self.batches(), loss, settings, after=after, lr=self.lr))


class DarkExperienceMethod(ReplayMethod):
    name = "dark experience replay"
    alpha, beta = 0.6, 0.3
    # `mse_loss` multiplies the factors of its gradient in another order than autograd does for the formula by hand. A
    # float32 gradient of the logits that differs in its last bit may then be rounded to the neighbouring float16.
    half_atol = 2e-5

    def callback(
        self,
        alpha: float = alpha,
        beta: float = beta,
        dataloader: Iterable[Any] | None = DEFAULT,
        insert_current: bool = False,
    ) -> DarkExperienceReplay:
        data = self.old_task() if dataloader is DEFAULT else dataloader
        return DarkExperienceReplay(alpha, beta, self.capacity, self.batch_size, data, insert_current=insert_current)

    def resumed(self) -> DarkExperienceReplay:
        return self.callback(dataloader=None)

    def faint(self, strength: float) -> DarkExperienceReplay:
        return self.callback(strength, strength, Draws(self.old_task()), insert_current=True)

    def by_hand(
        self,
        settings: Settings | None = None,
        insert_current: bool = False,
        alpha: float = alpha,
        beta: float = beta,
    ) -> Run:
        net, buffer = self.lab.net(), ReplayBuffer(self.capacity)

        def insert(batch: Batch) -> None:
            net.eval()
            with torch.no_grad(), settings.autocast() if settings is not None else torch.no_grad():
                logits = net(batch[0])
            net.train()
            buffer.insert(batch[0], batch[1], logits)

        def loss(batch: Batch, at: At) -> Tensor:
            drawn = self.draw(buffer, "experience_replay", at.step, at.position, 0)
            value = F.cross_entropy(net(batch[0]), batch[1])
            logits: Tensor = net(drawn.images)
            assert drawn.logits is not None
            distances = (logits.float() - drawn.logits) ** 2
            return value + alpha * distances.mean() + beta * F.cross_entropy(logits, drawn.labels)

        for batch in self.old_task():
            insert(batch)
        after = insert if insert_current else None
        return Run(net, self.lab.by_hand(net, self.batches(), loss, settings, after=after, lr=self.lr))


METHODS = (
    AnchoringMethod,
    DistillationMethod,
    ConsolidationMethod,
    SynapsesMethod,
    GradientMemoryMethod,
    ExperienceMethod,
    DarkExperienceMethod,
)


@pytest.fixture(params=METHODS, ids=lambda kind: kind.name)
def method(request: pytest.FixtureRequest, lab: Lab) -> Method:
    """Every method in turn."""
    made: Method = request.param(lab)
    return made


@pytest.fixture
def anchoring(lab: Lab) -> AnchoringMethod:
    return AnchoringMethod(lab)


@pytest.fixture
def lwf(lab: Lab) -> DistillationMethod:
    return DistillationMethod(lab)


@pytest.fixture
def ewc(lab: Lab) -> ConsolidationMethod:
    return ConsolidationMethod(lab)


@pytest.fixture
def mas(lab: Lab) -> SynapsesMethod:
    return SynapsesMethod(lab)


@pytest.fixture
def agem(lab: Lab) -> GradientMemoryMethod:
    return GradientMemoryMethod(lab)


@pytest.fixture
def replay(lab: Lab) -> ExperienceMethod:
    return ExperienceMethod(lab)


@pytest.fixture
def dark(lab: Lab) -> DarkExperienceMethod:
    return DarkExperienceMethod(lab)


@pytest.fixture(scope="session")
def ddp_script() -> ModuleType:
    """What the two processes run."""
    path = Path(__file__).with_name("ddp_methods.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ddp_results(tmp_path_factory: pytest.TempPathFactory, ddp_script: ModuleType) -> dict[str, Any]:
    """What all cases of the script gave; the two processes are started once."""
    folder = tmp_path_factory.mktemp("ddp")
    # What an outer Lightning or torchrun run would have set.
    outer = {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    run = subprocess.run(
        [sys.executable, str(ddp_script.__file__), str(folder)], env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    loaded: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return loaded
