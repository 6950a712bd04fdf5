"""Synaptic intelligence through a Trainer against loops written by hand; the module knows nothing of it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.callbacks.continual.synaptic_intelligence import SynapticIntelligence
from lightning_bd.callbacks.flatness import SharpnessAwareMinimization

if TYPE_CHECKING:
    from tests.callbacks.conftest import Batch, Lab, Module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Tensors = dict[str, Tensor]
STRENGTH, XI = 3.0, 0.1
TASKS = (1, 2, 3)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def make_module(lab: Lab, *hooks: type[LightningModule], net: nn.Module | None = None) -> Module:
    return lab.module(*hooks, net=net or make_net(), weight_decay=0.01)


@dataclass
class ByHand:
    """Tasks in plain PyTorch; the task's gradient is kept apart from the penalty's, which autograd makes."""

    lab: Lab
    accumulate: int = 1
    clip: float | None = None
    rho: float = 0.0
    dtype: torch.dtype | None = None
    epochs: int = 2
    net: nn.Module = field(default_factory=make_net)
    importance: Tensors = field(default_factory=dict)
    path: Tensors = field(default_factory=dict)

    def run(self, *tasks: int) -> ByHand:
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

        batches = self.lab.batches(task)
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


def assert_equal_importance(callback: SynapticIntelligence, expected: Tensors, rtol: float = 1e-4) -> None:
    carried = callback.carried_state()["carried"]
    assert set(carried) == {f"net.{name}" for name in expected}
    for name, value in expected.items():
        atol = rtol * float(value.max())
        torch.testing.assert_close(carried[f"net.{name}"], value, rtol=rtol, atol=atol, msg=name)


def fit(
    lab: Lab, callback: Callback, module: LightningModule, first: int, *others: int, sam: float = 0.0, **options: Any
) -> Trainer:
    for task in (first, *others):
        extra = [SharpnessAwareMinimization(rho=sam)] if sam else []
        trainer = lab.trainer(*extra, callback, **options)
        trainer.fit(module, lab.loader(lab.batches(task)))
    return trainer


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.3), (2, 0.3)])
def test_three_tasks_with_one_object(lab: Lab, accumulate: int, clip: float | None, rho: float) -> None:
    module, callback = make_module(lab), SynapticIntelligence(STRENGTH, XI)
    fit(lab, callback, module, *TASKS, sam=rho, settings=lab.settings(accumulate=accumulate, clip=clip))
    expected = ByHand(lab, accumulate, clip, rho).run(*TASKS)
    lab.assert_equal_states(module.net, expected.net, atol=5e-6)
    assert_equal_importance(callback, expected.importance, rtol=1e-3)
    plain = make_module(lab)
    for task in TASKS:
        lab.trainer(settings=lab.settings(accumulate=accumulate, clip=clip)).fit(plain, lab.loader(lab.batches(task)))
    assert lab.distance(module, plain) > 1e-4


def test_an_optimizer_of_some_parameters_with_sam(lab: Lab) -> None:
    """The others keep the gradients of all passes; the account of those that move is that of a frozen body."""

    class OnlyHead(LightningModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.get_submodule("net.4").parameters(), lr=0.05, momentum=0.9)

    module, frozen = make_module(lab, OnlyHead), make_module(lab, OnlyHead)
    frozen.net.requires_grad_(False).get_submodule("4").requires_grad_(True)
    callbacks = [SynapticIntelligence(STRENGTH, XI) for _ in range(2)]
    for callback, each in zip(callbacks, (module, frozen), strict=True):
        fit(lab, callback, each, 1, 2, sam=0.2)
    actual, expected = (callback.carried_state()["carried"] for callback in callbacks)
    assert set(expected) == {"net.4.weight", "net.4.bias"}
    for name, value in expected.items():
        assert value.any()
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-7)


def test_bf16(lab: Lab) -> None:
    module, callback = make_module(lab), SynapticIntelligence(STRENGTH, XI)
    fit(lab, callback, module, 1, 2, settings=lab.settings(bf16=True))
    expected = ByHand(lab, dtype=torch.bfloat16).run(1, 2)
    lab.assert_equal_states(module.net, expected.net, atol=1e-5)
    assert_equal_importance(callback, expected.importance, rtol=1e-3)


@pytest.mark.parametrize(("exponent", "fused"), [(10, False), (25, False), (10, True)])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(lab: Lab, exponent: int, fused: bool) -> None:
    """With the large scale steps overflow and are skipped; a fused optimizer unscales by itself."""
    module, callback = make_module(lab), SynapticIntelligence(STRENGTH, XI)
    module.sgd["fused"] = fused
    expected = ByHand(lab, dtype=torch.float16, epochs=4)
    for task in (1, 2):
        settings = lab.settings(exponent=exponent)
        trainer, by_hand = lab.trainer(callback, epochs=4, settings=settings), settings.scaler()
        trainer.fit(module, lab.loader(lab.batches(task)))
        expected.fit(task, by_hand)
        scaler = trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)
        assert scaler.get_scale() == by_hand.get_scale()
    lab.assert_equal_states(module.net, expected.net, atol=1e-4)
    assert_equal_importance(callback, expected.importance, rtol=1e-2)
    assert max(float(value.max()) for value in expected.importance.values()) > 0


def test_half_precision_weights(lab: Lab) -> None:
    module, callback = make_module(lab), SynapticIntelligence(STRENGTH, XI)
    fit(lab, callback, module, 1, 2, plugins=[HalfPrecision("bf16-true")])
    state = callback.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state["path"].values())
    assert any(bool(tensor.any()) for tensor in state["path"].values())
    assert state["anchor"]["net.4.weight"].dtype == torch.bfloat16


def test_path_integral_is_the_decrease_of_the_loss(lab: Lab) -> None:
    """For small steps of gradient descent on one batch; the penalty's part is not in it."""

    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

    class Slow(LightningModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(net.parameters(), lr=2e-3)

    def fit_one_batch(task: int) -> float:
        images, labels = lab.batches(task)[0]
        before = F.cross_entropy(module(images), labels).detach()
        lab.trainer(callback, epochs=100).fit(module, lab.loader([(images, labels)]))
        return float(before - F.cross_entropy(module(images), labels).detach())

    module, callback = make_module(lab, Slow, net=net), SynapticIntelligence(strength=5.0, xi=1e-3)
    for task in (1, 2):
        decrease = fit_one_batch(task)
        path = sum(float(tensor.sum()) for tensor in callback.state_dict()["path"].values())
        assert path == pytest.approx(decrease, rel=5e-3)
        assert decrease > 0.01


def test_a_weight_that_made_the_loss_worse_does_not_count(lab: Lab) -> None:
    class Decays(LightningModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.get_submodule("net").parameters(), lr=0.05, weight_decay=5.0)

    callback = SynapticIntelligence(STRENGTH, XI)
    fit(lab, callback, make_module(lab, Decays), 1)
    path, importance = callback.state_dict()["path"], callback.carried_state()["carried"]
    assert any(bool((tensor < 0).any()) for tensor in path.values())
    for name, tensor in path.items():
        assert torch.equal(importance[name] > 0, tensor > 0)


@pytest.mark.parametrize("strength", [0.0, STRENGTH])
def test_the_first_task_is_the_plain_run(lab: Lab, strength: float) -> None:
    module, plain = make_module(lab), make_module(lab)
    callback = SynapticIntelligence(strength, XI)
    fit(lab, callback, module, 1)
    lab.trainer().fit(plain, lab.loader(lab.batches(1)))
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in module.state_dict().items())
    assert all(value.any() for name, value in callback.carried_state()["carried"].items() if "weight" in name)


def test_zero_strength_is_the_plain_run_and_keeps_account(lab: Lab) -> None:
    module, plain, callback = make_module(lab), make_module(lab), SynapticIntelligence(0.0, XI)
    trainer = fit(lab, callback, module, 1, 2)
    for task in (1, 2):
        lab.trainer().fit(plain, lab.loader(lab.batches(task)))
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in module.state_dict().items())
    assert not trainer.callback_metrics
    first = SynapticIntelligence(STRENGTH, XI)
    first.carry_over(callback.carried_state())
    assert fit(lab, first, module, 3).callback_metrics["si/penalty"] > 0


@pytest.mark.parametrize("earlier", [(), (1,)])
def test_resume_goes_on(lab: Lab, tmp_path: Path, earlier: tuple[int, ...]) -> None:
    whole, resumed, path = make_module(lab), make_module(lab), tmp_path / "first.ckpt"
    callback = SynapticIntelligence(STRENGTH, XI)
    for task in earlier:
        fit(lab, callback, whole, task)
    lab.trainer(callback, lab.saves_first_epoch(path), accumulate=2).fit(whole, lab.loader(lab.batches(2)))
    again = SynapticIntelligence(STRENGTH, XI)
    lab.trainer(again, accumulate=2).fit(resumed, lab.loader(lab.batches(2)), ckpt_path=path, weights_only=True)
    lab.assert_equal_states(resumed.net, whole.net, atol=0)
    for key in ("importance", "anchor", "path"):
        expected = callback.state_dict()[key]
        assert all(torch.equal(again.state_dict()[key][name], tensor) for name, tensor in expected.items())
    carried = callback.carried_state()["carried"]
    assert all(torch.equal(again.carried_state()["carried"][name], tensor) for name, tensor in carried.items())


def test_a_finished_fit_may_still_be_resumed(lab: Lab, tmp_path: Path) -> None:
    whole, resumed, path = make_module(lab), make_module(lab), tmp_path / "end.ckpt"
    callback = SynapticIntelligence(STRENGTH, XI)
    fit(lab, callback, whole, 1)
    fit(lab, callback, whole, 2, epochs=4)
    again = SynapticIntelligence(STRENGTH, XI)
    fit(lab, again, resumed, 1)
    fit(lab, again, resumed, 2, epochs=2).save_checkpoint(path)
    for one in (again, SynapticIntelligence(STRENGTH, XI)):
        module = make_module(lab)
        lab.trainer(one, epochs=4).fit(module, lab.loader(lab.batches(2)), ckpt_path=path, weights_only=True)
        lab.assert_equal_states(module.net, whole.net, atol=0)
        assert torch.equal(
            one.carried_state()["carried"]["net.4.weight"], callback.carried_state()["carried"]["net.4.weight"]
        )


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_batches_without_a_loss(lab: Lab) -> None:
    """Steps without a gradient, and windows in which some batches have none."""

    class Skips(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return None if batch_idx in (1, 2, 3) else super().training_step(batch, batch_idx)

    def run(*callbacks: Callback) -> Module:
        module = make_module(lab, Skips)
        for task in (1, 2):
            lab.trainer(*callbacks, accumulate=2).fit(module, lab.loader(lab.batches(task)))
        return module

    callback = SynapticIntelligence(1e-30, XI)
    module = run(callback)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), run().parameters(), strict=True))
    assert all(bool(torch.isfinite(value).all()) for value in callback.carried_state()["carried"].values())


def test_parameters_that_the_loss_does_not_use(lab: Lab) -> None:
    module, callback, unused = make_module(lab), SynapticIntelligence(STRENGTH, XI), nn.Linear(2, 2)
    module.unused = unused
    before = unused.weight.detach().clone()
    fit(lab, callback, module, 1, 2)
    assert torch.equal(unused.weight, before)
    assert unused.weight.grad is None
    assert not callback.carried_state()["carried"]["unused.weight"].any()


def test_penalty_and_share_are_logged(lab: Lab) -> None:
    module, callback = make_module(lab), SynapticIntelligence(STRENGTH, XI)
    fit(lab, callback, module, 1)
    trainer = fit(lab, callback, module, 2, accumulate=2)
    state = callback.state_dict()
    weights = dict(module.named_parameters())
    terms = [(v * (weights[name] - state["anchor"][name]) ** 2).sum() for name, v in state["importance"].items()]
    torch.testing.assert_close(trainer.callback_metrics["si/penalty"], STRENGTH * torch.stack(terms).sum().detach())
    assert 0 < trainer.callback_metrics["si/share"] < 1


def test_exception_lets_go_of_the_module(lab: Lab) -> None:
    class Fails(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
            if trainer.global_step == 2:
                raise OSError("broken")

    module, callback = make_module(lab), SynapticIntelligence(STRENGTH, XI)
    fit(lab, callback, module, 1)
    carried = copy.deepcopy(callback.carried_state())
    with pytest.raises(OSError, match="broken"):
        lab.trainer(callback, Fails()).fit(module, lab.loader(lab.batches(2)))
    assert callback._penalty is None
    assert callback._step is None
    assert not callback._penalty_gradient
    assert all(torch.equal(v, carried["carried"][n]) for n, v in callback.carried_state()["carried"].items())


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


def test_manual_optimization_is_refused(lab: Lab) -> None:
    module = make_module(lab)
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="`SynapticIntelligence` needs automatic optimization"):
        lab.trainer(SynapticIntelligence()).fit(module, lab.loader(lab.batches(1)))
