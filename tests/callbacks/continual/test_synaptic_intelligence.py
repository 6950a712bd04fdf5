"""Synaptic intelligence through a Trainer against loops written by hand; the module knows nothing of it."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.continual.synaptic_intelligence import SynapticIntelligence
from lightning_bd.callbacks.flatness import SharpnessAwareMinimization

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]
STRENGTH, XI = 3.0, 0.1
TASKS = (1, 2, 3)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def make_batches(task: int) -> list[Batch]:
    """Five batches of eight images: with two in a step, the last step has one."""
    generator = torch.Generator().manual_seed(task)
    images = torch.randn(5, 8, 1, 6, 6, generator=generator)
    return list(zip(images, torch.randint(3, (5, 8), generator=generator), strict=True))


def make_loader(task: int) -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(task), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


class Module(LightningModule):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, fused=self.fused)


def make_trainer(
    *callbacks: Callback,
    epochs: int = 2,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["bf16-mixed"] | None = None,
    plugins: list[Any] | None = None,
) -> Trainer:
    return Trainer(
        callbacks=list(callbacks),
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision=precision,
        plugins=plugins,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


@dataclass
class ByHand:
    """Tasks in plain PyTorch; the task's gradient is kept apart from the penalty's, which autograd makes."""

    accumulate: int = 1
    clip: float | None = None
    rho: float = 0.0
    dtype: torch.dtype | None = None
    epochs: int = 2
    net: nn.Module = field(default_factory=make_net)
    importance: Tensors = field(default_factory=dict)
    path: Tensors = field(default_factory=dict)

    def run(self, *tasks: int) -> "ByHand":
        for task in tasks:
            self.fit(task, torch.amp.GradScaler("cpu", enabled=False))
        return self

    def fit(self, task: int, scaler: torch.amp.GradScaler) -> None:
        net, names = self.net, [name for name, _ in self.net.named_parameters()]
        parameters = list(net.parameters())
        importance = {name: self.importance.get(name, torch.zeros(())) for name in names}
        anchor = {name: p.detach().clone() for name, p in net.named_parameters()}
        self.path = {name: torch.zeros_like(p.detach()) for name, p in net.named_parameters()}
        opt = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)

        def gradients(window: list[Batch]) -> tuple[list[Tensor], list[Tensor]]:
            """Of the task, and of task plus penalty."""
            task_sum, sum_ = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
            for images, labels in window:
                with nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype):
                    loss = F.cross_entropy(net(images), labels)
                terms = [(importance[name] * (p - anchor[name]) ** 2).sum() for name, p in net.named_parameters()]
                penalty = STRENGTH * torch.stack(terms).sum()
                of_task = torch.autograd.grad(scaler.scale(loss / self.accumulate), parameters)
                of_penalty = torch.autograd.grad(scaler.scale(penalty / self.accumulate), parameters)
                for index in range(len(parameters)):
                    task_sum[index] += of_task[index]
                    sum_[index] += of_task[index] + of_penalty[index]
            return task_sum, sum_

        batches = make_batches(task)
        for start in [*range(0, len(batches), self.accumulate)] * self.epochs:
            window = batches[start : start + self.accumulate]
            of_task, total = gradients(window)
            if self.rho:
                norm = torch.cat([g.flatten() for g in total]).norm()
                kept = copy.deepcopy(net.state_dict())
                with torch.no_grad():
                    for p, g in zip(parameters, total, strict=True):
                        p.add_(self.rho * g / norm)
                of_task, total = gradients(window)
                net.load_state_dict(kept)
            before = [p.detach().clone() for p in parameters]
            for p, g in zip(parameters, total, strict=True):
                p.grad = g
            scale = scaler.get_scale()
            scaler.unscale_(opt)
            if self.clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if all(bool(torch.isfinite(g).all()) for g in total):
                for name, g, p, old in zip(names, of_task, parameters, before, strict=True):
                    self.path[name] -= g / scale * (p.detach() - old)
        for name, p in net.named_parameters():
            moved = p.detach() - anchor[name]
            self.importance[name] = importance[name] + self.path[name].clamp(min=0) / (moved**2 + XI)


def assert_equal_nets(actual: nn.Module, expected: nn.Module, atol: float = 1e-6) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def assert_equal_importance(callback: SynapticIntelligence, expected: Tensors, rtol: float = 1e-4) -> None:
    carried = callback.carried_state()["carried"]
    assert set(carried) == {f"net.{name}" for name in expected}
    for name, value in expected.items():
        atol = rtol * float(value.max())
        torch.testing.assert_close(carried[f"net.{name}"], value, rtol=rtol, atol=atol, msg=name)


def fit(
    callback: Callback, module: LightningModule, first: int, *others: int, sam: float = 0.0, **options: Any
) -> Trainer:
    for task in (first, *others):
        extra = [SharpnessAwareMinimization(rho=sam)] if sam else []
        trainer = make_trainer(*extra, callback, **options)
        trainer.fit(module, make_loader(task))
    return trainer


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.3), (2, 0.3)])
def test_three_tasks_with_one_object(accumulate: int, clip: float | None, rho: float) -> None:
    module, callback = Module(), SynapticIntelligence(STRENGTH, XI)
    fit(callback, module, *TASKS, sam=rho, accumulate=accumulate, clip=clip)
    expected = ByHand(accumulate, clip, rho).run(*TASKS)
    assert_equal_nets(module.net, expected.net, atol=5e-6)
    assert_equal_importance(callback, expected.importance, rtol=1e-3)
    plain = Module()
    for task in TASKS:
        make_trainer(accumulate=accumulate, clip=clip).fit(plain, make_loader(task))
    distance = max(
        float((a - b).detach().abs().max()) for a, b in zip(module.parameters(), plain.parameters(), strict=True)
    )
    assert distance > 1e-4


def test_bf16() -> None:
    module, callback = Module(), SynapticIntelligence(STRENGTH, XI)
    fit(callback, module, 1, 2, precision="bf16-mixed")
    expected = ByHand(dtype=torch.bfloat16).run(1, 2)
    assert_equal_nets(module.net, expected.net, atol=1e-5)
    assert_equal_importance(callback, expected.importance, rtol=1e-3)


@pytest.mark.parametrize(("exponent", "fused"), [(10, False), (25, False), (10, True)])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int, fused: bool) -> None:
    """With the large scale steps overflow and are skipped; a fused optimizer unscales by itself."""
    module, callback = Module(), SynapticIntelligence(STRENGTH, XI)
    module.fused = fused
    expected = ByHand(dtype=torch.float16, epochs=4)
    for task in (1, 2):
        scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
        trainer = make_trainer(callback, epochs=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        trainer.fit(module, make_loader(task))
        expected.fit(task, by_hand)
        assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)
        assert scaler.get_scale() == by_hand.get_scale()
    assert_equal_nets(module.net, expected.net, atol=1e-4)
    assert_equal_importance(callback, expected.importance, rtol=1e-2)
    assert max(float(value.max()) for value in expected.importance.values()) > 0


def test_half_precision_weights() -> None:
    module, callback = Module(), SynapticIntelligence(STRENGTH, XI)
    fit(callback, module, 1, 2, plugins=[HalfPrecision("bf16-true")])
    state = callback.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state["path"].values())
    assert any(bool(tensor.any()) for tensor in state["path"].values())
    assert state["anchor"]["net.4.weight"].dtype == torch.bfloat16


def test_path_integral_is_the_decrease_of_the_loss() -> None:
    """For small steps of gradient descent on one batch; the penalty's part is not in it."""

    class Slow(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=2e-3)

    def fit_one_batch(task: int) -> float:
        images, labels = make_batches(task)[0]
        before = F.cross_entropy(module(images), labels).detach()
        loader = DataLoader(TensorDataset(images, labels), batch_size=8)
        make_trainer(callback, epochs=100).fit(module, loader)
        return float(before - F.cross_entropy(module(images), labels).detach())

    module, callback = Slow(), SynapticIntelligence(strength=5.0, xi=1e-3)
    for task in (1, 2):
        decrease = fit_one_batch(task)
        path = sum(float(tensor.sum()) for tensor in callback.state_dict()["path"].values())
        assert path == pytest.approx(decrease, rel=5e-3)
        assert decrease > 0.01


def test_a_weight_that_made_the_loss_worse_does_not_count() -> None:
    class Decays(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=0.05, weight_decay=5.0)

    callback = SynapticIntelligence(STRENGTH, XI)
    fit(callback, Decays(), 1)
    path, importance = callback.state_dict()["path"], callback.carried_state()["carried"]
    assert any(bool((tensor < 0).any()) for tensor in path.values())
    for name, tensor in path.items():
        assert torch.equal(importance[name] > 0, tensor > 0)


@pytest.mark.parametrize("strength", [0.0, STRENGTH])
def test_the_first_task_is_the_plain_run(strength: float) -> None:
    module, plain = Module(), Module()
    callback = SynapticIntelligence(strength, XI)
    fit(callback, module, 1)
    make_trainer().fit(plain, make_loader(1))
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in module.state_dict().items())
    assert all(value.any() for name, value in callback.carried_state()["carried"].items() if "weight" in name)


def test_zero_strength_is_the_plain_run_and_keeps_account() -> None:
    module, plain, callback = Module(), Module(), SynapticIntelligence(0.0, XI)
    trainer = fit(callback, module, 1, 2)
    for task in (1, 2):
        make_trainer().fit(plain, make_loader(task))
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in module.state_dict().items())
    assert not trainer.callback_metrics
    first = SynapticIntelligence(STRENGTH, XI)
    first.carry_over(callback.carried_state())
    assert fit(first, module, 3).callback_metrics["si/penalty"] > 0


class SavesFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("earlier", [(), (1,)])
def test_resume_goes_on(tmp_path: Path, earlier: tuple[int, ...]) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    callback = SynapticIntelligence(STRENGTH, XI)
    for task in earlier:
        fit(callback, whole, task)
    make_trainer(callback, SavesFirstEpoch(path), accumulate=2).fit(whole, make_loader(2))
    again = SynapticIntelligence(STRENGTH, XI)
    make_trainer(again, accumulate=2).fit(resumed, make_loader(2), ckpt_path=path, weights_only=True)
    assert_equal_nets(resumed.net, whole.net, atol=0)
    for key in ("importance", "anchor", "path"):
        expected = callback.state_dict()[key]
        assert all(torch.equal(again.state_dict()[key][name], tensor) for name, tensor in expected.items())
    carried = callback.carried_state()["carried"]
    assert all(torch.equal(again.carried_state()["carried"][name], tensor) for name, tensor in carried.items())


def test_a_finished_fit_may_still_be_resumed(tmp_path: Path) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "end.ckpt"
    callback = SynapticIntelligence(STRENGTH, XI)
    fit(callback, whole, 1)
    fit(callback, whole, 2, epochs=4)
    again = SynapticIntelligence(STRENGTH, XI)
    fit(again, resumed, 1)
    fit(again, resumed, 2, epochs=2).save_checkpoint(path)
    for one in (again, SynapticIntelligence(STRENGTH, XI)):
        module = Module()
        make_trainer(one, epochs=4).fit(module, make_loader(2), ckpt_path=path, weights_only=True)
        assert_equal_nets(module.net, whole.net, atol=0)
        assert torch.equal(
            one.carried_state()["carried"]["net.4.weight"], callback.carried_state()["carried"]["net.4.weight"]
        )


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_batches_without_a_loss() -> None:
    """Steps without a gradient, and windows in which some batches have none."""

    class Skips(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return None if batch_idx in (1, 2, 3) else super().training_step(batch, batch_idx)

    def run(*callbacks: Callback) -> Skips:
        module = Skips()
        for task in (1, 2):
            make_trainer(*callbacks, accumulate=2).fit(module, make_loader(task))
        return module

    callback = SynapticIntelligence(1e-30, XI)
    module = run(callback)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), run().parameters(), strict=True))
    assert all(bool(torch.isfinite(value).all()) for value in callback.carried_state()["carried"].values())


def test_parameters_that_the_loss_does_not_use() -> None:
    class Unused(Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    module, callback = Unused(), SynapticIntelligence(STRENGTH, XI)
    before = module.unused.weight.detach().clone()
    fit(callback, module, 1, 2)
    assert torch.equal(module.unused.weight, before)
    assert module.unused.weight.grad is None
    assert not callback.carried_state()["carried"]["unused.weight"].any()


def test_penalty_and_share_are_logged() -> None:
    module, callback = Module(), SynapticIntelligence(STRENGTH, XI)
    fit(callback, module, 1)
    trainer = fit(callback, module, 2, accumulate=2)
    state = callback.state_dict()
    weights = dict(module.named_parameters())
    terms = [(v * (weights[name] - state["anchor"][name]) ** 2).sum() for name, v in state["importance"].items()]
    torch.testing.assert_close(trainer.callback_metrics["si/penalty"], STRENGTH * torch.stack(terms).sum().detach())
    assert 0 < trainer.callback_metrics["si/share"] < 1


def test_exception_lets_go_of_the_module() -> None:
    class Fails(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
            if trainer.global_step == 2:
                raise OSError("broken")

    module, callback = Module(), SynapticIntelligence(STRENGTH, XI)
    fit(callback, module, 1)
    carried = copy.deepcopy(callback.carried_state())
    with pytest.raises(OSError, match="broken"):
        make_trainer(callback, Fails()).fit(module, make_loader(2))
    assert callback._penalty is None
    assert callback._step is None
    assert not callback._penalty_gradient
    assert all(torch.equal(v, carried["carried"][n]) for n, v in callback.carried_state()["carried"].items())


def test_manual_optimization_is_refused() -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="`SynapticIntelligence` needs automatic optimization"):
        make_trainer(SynapticIntelligence()).fit(module, make_loader(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, r"`strength` to be a non-negative float, but got -1\.0"),
        ({"xi": 0.0}, r"`xi` to be a positive float, but got 0\.0"),
        ({"xi": float("inf")}, r"`xi` to be a positive float, but got inf"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynapticIntelligence(**arguments)
