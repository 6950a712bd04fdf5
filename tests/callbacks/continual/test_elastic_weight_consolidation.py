"""EWC through a Trainer against loops written by hand; the module knows nothing of EWC."""

import copy
import csv
import random
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks import ElasticWeightConsolidation, SharpnessAwareMinimization
from lightning_bd.callbacks.continual.quadratic_penalty import QuadraticPenalty
from lightning_bd.functional.fisher import FisherKind, fisher_diagonal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
STRENGTH = 3.0


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
    )


def make_batches(seed: int = 1) -> list[Batch]:
    """Five batches of eight images: with two in a step, the last step has one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, 8, 1, 6, 6, generator=generator)
    return list(zip(images, torch.randint(3, (5, 8), generator=generator), strict=True))


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.net, self.lr = make_net(), lr
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)


class ReplaysOldTask(LightningDataModule):
    """Replays the previous task, on the device that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[torch.device] = []

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return make_loader()

    def reference_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor, str]]:
        self.devices.append(device)
        for images, labels in OLD_TASK:
            yield images.to(device), labels.to(device), "what else a batch may hold"


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


OLD_TASK = make_batches(seed=2)


def make_callback(
    strength: float = STRENGTH,
    fisher: FisherKind = "empirical",
    num_samples: int | None = None,
    dataloader: Iterable[object] | None = OLD_TASK,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    seed: int = 0,
) -> ElasticWeightConsolidation:
    return ElasticWeightConsolidation(strength, fisher, num_samples, dataloader, chunk_size, max_memory, seed)


def make_trainer(
    *callbacks: Callback,
    epochs: int = 2,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["bf16-mixed"] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Trainer:
    return Trainer(
        callbacks=list(callbacks),
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision=precision,
        plugins=[] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def penalty(net: nn.Module, fisher: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
    """The formula, for autograd."""
    terms = [(fisher[name] * (p - anchor[name]) ** 2).sum() for name, p in net.named_parameters()]
    return STRENGTH * torch.stack(terms).sum()


def loop_by_hand(
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rho: float = 0.0,
    kind: FisherKind = "empirical",
) -> nn.Module:
    """Two epochs of plain PyTorch on loss plus penalty; with ``rho``, at the weights that SAM perturbs."""
    net = make_net()
    fisher = fisher_diagonal(net, OLD_TASK, kind)
    anchor = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches = list(enumerate(make_batches()))
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]

    def backward(window: list[tuple[int, Batch]]) -> None:
        opt.zero_grad()
        for index, (images, labels) in window:
            torch.manual_seed(100 + index)
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(net(images), labels)
            # Lightning divides by `accumulate` in a shorter last window too.
            scaler.scale((loss + penalty(net, fisher, anchor)) / accumulate).backward()  # type: ignore[no-untyped-call]

    for window in windows * 2:
        backward(window)
        if rho:
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            weights, buffers = [p.detach().clone() for p in net.parameters()], [b.clone() for b in net.buffers()]
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    p.add_(rho * g / norm)
            backward(window)
            with torch.no_grad():
                for now, before in zip([*net.parameters(), *net.buffers()], [*weights, *buffers], strict=True):
                    now.copy_(before)
        scaler.unscale_(opt)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(opt)
        scaler.update()
    return net


def assert_equal_states(actual: nn.Module, expected: nn.Module, atol: float = 1e-6) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_penalty_in_the_loss(accumulate: int, clip: float | None) -> None:
    module, plain = Module(), Module()
    make_trainer(make_callback(), accumulate=accumulate, clip=clip).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, clip))
    make_trainer(accumulate=accumulate, clip=clip).fit(plain, make_loader())
    assert distance(module.net, plain.net) > 1e-4


@pytest.mark.parametrize("kind", ["exact", "sampled", "weighted"])
def test_kinds_of_fisher_information(kind: FisherKind) -> None:
    module, callback = Module(), make_callback(fisher=kind)
    make_trainer(callback).fit(module, make_loader())
    if kind != "sampled":
        assert_equal_states(module.net, loop_by_hand(kind=kind))
    again, other = make_callback(fisher=kind), make_callback(fisher=kind, seed=1)
    for repeated in (again, other):
        make_trainer(repeated, epochs=1).fit(Module(), make_loader())
    weight = "net.5.weight"
    first, second, third = (c.state_dict()["fisher"][weight] for c in (callback, again, other))
    assert torch.equal(first, second)
    assert torch.equal(first, third) == (kind != "sampled")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16(accumulate: int) -> None:
    module = Module()
    make_trainer(make_callback(), precision="bf16-mixed", accumulate=accumulate, clip=1.0).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, 1.0, torch.bfloat16))


@pytest.mark.parametrize("exponent", [10, 40])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int, accumulate: int) -> None:
    """With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    make_trainer(make_callback(), scaler=scaler, accumulate=accumulate).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, dtype=torch.float16, scaler=by_hand), atol=2e-6)
    assert scaler.get_scale() == by_hand.get_scale()
    assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ewc_first", [True, False])
def test_counts_in_both_passes_of_sam(accumulate: int, ewc_first: bool) -> None:
    module = Module()
    callbacks: list[Callback] = [SharpnessAwareMinimization(rho=0.2), make_callback()]
    trainer = make_trainer(*callbacks[:: -1 if ewc_first else 1], accumulate=accumulate)
    trainer.fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, rho=0.2))
    assert distance(module.net, loop_by_hand(accumulate)) > 1e-3


def test_zero_strength_is_the_plain_run() -> None:
    module, plain, callback = Module(), Module(), ElasticWeightConsolidation(strength=0)
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    make_trainer().fit(plain, make_loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert not trainer.callback_metrics
    assert callback.state_dict() == {"fisher": {}, "anchor": {}}


def test_measurement_leaves_no_trace() -> None:
    """A strength so small that it changes no weight leaves the plain run, random numbers included."""

    class Unseeded(Module):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            """Draw the masks from the global state."""

    def shuffled(seed: int) -> DataLoader[tuple[Tensor, ...]]:
        images, labels = zip(*make_batches(seed), strict=True)
        return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8, shuffle=True)

    class DrawsInPython(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            random.random()
            np.random.rand()
            return super().__iter__()

    runs = []
    for callbacks in ([], [make_callback(strength=1e-30, dataloader=DrawsInPython(OLD_TASK), fisher="sampled")]):
        module = Unseeded()
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        make_trainer(*callbacks).fit(module, shuffled(1))
        runs.append((module, random.random(), np.random.rand(), torch.rand(())))
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert runs[0][1:] == runs[1][1:]
    make_trainer(make_callback(strength=1e-30, dataloader=shuffled(2))).fit(runs[1][0], make_loader())


def test_datamodule_replays_the_previous_task() -> None:
    module, data = Module(), ReplaysOldTask()
    make_trainer(make_callback(dataloader=None)).fit(module, datamodule=data)
    assert_equal_states(module.net, loop_by_hand())
    assert data.devices == [torch.device("cpu")]


def test_dataloader_passes_through_the_hooks_of_the_module() -> None:
    class Prepares(Module):
        def on_before_batch_transfer(self, batch: Batch | dict[str, Batch], dataloader_idx: int) -> Batch:
            return batch["pair"] if isinstance(batch, dict) else batch

        def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
            return batch[0] / 2, batch[1]

    callback = make_callback(dataloader=[{"pair": (x * 2, y)} for x, y in OLD_TASK])
    make_trainer(callback, epochs=1).fit(Prepares(), make_loader())
    expected = fisher_diagonal(Module().net, OLD_TASK)
    for name, value in callback.state_dict()["fisher"].items():
        torch.testing.assert_close(value, expected[name.removeprefix("net.")])


def test_num_samples_and_memory_options() -> None:
    callback = make_callback(num_samples=11, chunk_size=3, max_memory=1000)
    module = Module()
    expected = fisher_diagonal(module.net, OLD_TASK, num_samples=11)
    make_trainer(callback, epochs=1).fit(module, make_loader())
    fisher = callback.state_dict()["fisher"]
    assert set(fisher) == {f"net.{name}" for name in expected}  # nothing for what is frozen
    for name, value in expected.items():
        torch.testing.assert_close(fisher[f"net.{name}"], value)


class SavesFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resume_keeps_anchor_and_fisher(tmp_path: Path) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    callback = make_callback()
    make_trainer(callback, SavesFirstEpoch(path)).fit(whole, make_loader())
    again = make_callback(dataloader=None)  # measuring again would fail
    make_trainer(again).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal_states(resumed.net, whole.net, atol=0)
    for key, tensors in callback.state_dict().items():
        assert all(torch.equal(again.state_dict()[key][name], tensor) for name, tensor in tensors.items())


def test_second_fit_anchors_anew(tmp_path: Path) -> None:
    callback, module = make_callback(), Module()
    make_trainer(callback, epochs=1).fit(module, make_loader())
    first = copy.deepcopy(callback.state_dict())
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    make_trainer(callback, epochs=1).fit(module, make_loader())
    second = callback.state_dict()
    assert all(torch.equal(second["anchor"][name], value) for name, value in weights.items())
    assert not torch.equal(first["fisher"]["net.5.weight"], second["fisher"]["net.5.weight"])


def test_parameters_frozen_later_or_without_gradient() -> None:
    class Freezes(Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(64, 3)
            self.use_extra = True

        def forward(self, x: Tensor) -> Tensor:
            features = self.net[:5](x)  # type: ignore[index]
            logits: Tensor = self.net[5](features)  # type: ignore[index]
            return logits + self.extra(features) if self.use_extra else logits

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def on_train_start(self) -> None:
            self.use_extra = False
            self.net[0].requires_grad_(False)  # type: ignore[index]
            with torch.no_grad():
                self.extra.weight += 0.1

    module, callback = Freezes(), make_callback()
    make_trainer(callback, epochs=1).fit(module, make_loader())
    state = callback.state_dict()
    assert torch.equal(module.net.state_dict()["0.weight"], state["anchor"]["net.0.weight"])
    # The penalty alone moves a layer that the loss does not use: five steps of plain gradient descent.
    fisher, distance = state["fisher"]["extra.weight"], torch.full((3, 64), 0.1)
    expected = distance * (1 - 0.05 * 2 * STRENGTH * fisher) ** 5
    torch.testing.assert_close(module.extra.weight - state["anchor"]["extra.weight"], expected, atol=1e-6, rtol=1e-4)


def test_unused_parameters_are_left_alone() -> None:
    class Unused(Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=0.1)

    module = Unused()
    before = module.unused.weight.detach().clone()
    make_trainer(make_callback(), epochs=1).fit(module, make_loader())
    assert module.unused.weight.grad is None
    assert torch.equal(module.unused.weight, before)


def test_half_precision_weights() -> None:
    module, callback = Module(), make_callback()
    trainer = Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", plugins=[HalfPrecision("bf16-true")], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, make_loader())
    assert callback.state_dict()["fisher"]["net.5.weight"].dtype == torch.float32
    assert callback.state_dict()["anchor"]["net.5.weight"].dtype == torch.bfloat16
    assert trainer.callback_metrics["ewc/penalty"] > 0


def test_penalty_and_share_are_logged() -> None:
    losses: list[Tensor] = []

    class Remembers(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            losses.append(loss.detach())
            return loss

    module, callback = Remembers(), make_callback()
    trainer = make_trainer(callback, accumulate=2)
    trainer.fit(module, make_loader())
    state = {
        key: {name.removeprefix("net."): value for name, value in tensors.items()}
        for key, tensors in callback.state_dict().items()
    }
    value = penalty(module.net, state["fisher"], state["anchor"]).detach()
    assert value > 0
    torch.testing.assert_close(trainer.callback_metrics["ewc/penalty"], value)
    share = value / (value + losses[-1])
    torch.testing.assert_close(trainer.callback_metrics["ewc/share"], share)


def test_logs_when_the_loggers_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = 0
    original = QuadraticPenalty.value

    def count(self: QuadraticPenalty) -> Tensor:
        nonlocal values
        values += 1
        return original(self)

    monkeypatch.setattr(QuadraticPenalty, "value", count)
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        callbacks=[make_callback()], max_epochs=3, accumulate_grad_batches=2, accelerator="cpu", logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=4,
    )  # fmt: skip
    trainer.fit(Module(), make_loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["ewc/penalty"]]
    assert [row["step"] for row in rows] == ["3", "7"]  # of nine steps, counted from 0
    assert all(float(row["ewc/penalty"]) > 0 and 0 < float(row["ewc/share"]) < 1 for row in rows)
    assert values == 2


def test_warns_of_overshooting() -> None:
    # lr * 2 * strength * max F: the message holds the product.
    module = Module(lr=0.05)
    largest = max(float(f.max()) for f in fisher_diagonal(module.net, OLD_TASK).values())
    strength = 1.5 / (0.05 * 2 * largest)
    with pytest.warns(
        UserWarning, match=r"learning rate times 2 \* strength \* max\(F\) is .* = 1.5\. .*Lower `strength`"
    ):
        make_trainer(make_callback(strength=strength), epochs=1).fit(module, make_loader())
    # Below 1 there is no warning, which would be an error here.
    make_trainer(make_callback(strength=strength / 2), epochs=1).fit(Module(), make_loader())


def test_warning_knows_the_rate_after_a_warm_up() -> None:
    class WarmsUp(Module):
        def configure_optimizers(self) -> OptimizerLRScheduler:  # type: ignore[override]
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1e-6)]

    largest = max(float(f.max()) for f in fisher_diagonal(make_net(), OLD_TASK).values())
    with pytest.warns(UserWarning, match="overshoots"):
        make_trainer(make_callback(strength=1.5 / (0.1 * largest)), epochs=1).fit(WarmsUp(), make_loader())


def test_exception_lets_go_of_the_module() -> None:
    class Fails(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            raise OSError("broken")

    callback = make_callback()
    module = Fails()
    with pytest.raises(OSError, match="broken"):
        make_trainer(callback).fit(module, make_loader())
    assert callback._penalty is None
    assert all(p.grad is None for p in module.parameters())


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class SecondOrder(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.net.parameters())


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (Manual, {}, "needs automatic optimization, but `Manual` sets `automatic_optimization = False`. Remove that"),
        (SecondOrder, {}, "which LBFGS compares. Use another optimizer"),
        (Module, {"dataloader": None}, r"Pass `dataloader=...`, or fit with a datamodule that has `reference_batches"),
        (Module, {"dataloader": []}, "got no sample .* Pass a `dataloader` that is not empty"),
        (Module, {"dataloader": [(torch.full((1, 1, 6, 6), torch.inf), torch.tensor([0]))]}, "is not finite. Check"),
    ],
)
def test_unsuitable_fits_are_refused(module: type[Module], arguments: dict[str, Any], message: str) -> None:
    trainer = make_trainer(make_callback(**arguments))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module(), make_loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_split_parameters_are_refused(strategy: type[Strategy]) -> None:
    trainer = make_trainer()
    # Built without __init__, which needs packages and devices that are not at hand.
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=rf"does not support `{strategy.__name__}`. Use .*=\"ddp\""):
        make_callback().setup(trainer, Module(), "fit")


def test_ddp_and_other_stages_are_not_refused() -> None:
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = DDPStrategy()
    make_callback().setup(trainer, Module(), "fit")
    make_callback().setup(trainer, Manual(), "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, r"`strength` to be a non-negative float, but got -1\.0"),
        ({"strength": float("nan")}, "`strength` to be a non-negative float, but got nan"),
        ({"fisher": "true"}, r"`fisher` to be one of \('empirical', .* but got 'true'"),
        ({"num_samples": 0}, "`num_samples` to be a positive integer or None, but got 0"),
        ({"chunk_size": 0}, "`chunk_size` to be a positive integer or None, but got 0"),
        ({"max_memory": -5}, "`max_memory` to be a positive integer or None, but got -5"),
        ({"gamma": -0.1}, r"`gamma` to be in \[0, 1\] or None, but got -0\.1"),
        ({"reference": "poisoned"}, r"`reference` to be one of \('as_trained', 'clean'\), but got 'poisoned'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticWeightConsolidation(**arguments)
