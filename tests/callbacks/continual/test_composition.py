"""Every method through a Trainer, alone and with SAM, against loops by hand; the module knows nothing of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn

from lightning_bd.callbacks.flatness.sharpness_aware_minimization import SharpnessAwareMinimization

if TYPE_CHECKING:
    from tests.callbacks.conftest import Batch, Lab
    from tests.callbacks.continual.conftest import Method

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

# Of conftest's `Settings`.
SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "clipped": {"clip": 0.5},
    "accumulated and clipped": {"accumulate": 2, "clip": 0.5},
    "bf16": {"bf16": True, "clip": 1.0},
    "bf16 accumulated": {"bf16": True, "clip": 1.0, "accumulate": 2},
    "fp16": {"exponent": 10, "clip": 1.0},
    "fp16 accumulated": {"exponent": 10, "accumulate": 2},
    "fp16 with overflows": {"exponent": 40, "clip": 1.0},
    "fp16 with overflows accumulated": {"exponent": 40, "accumulate": 2},
    "fp16 with SAM": {"exponent": 10, "accumulate": 2, "rho": 0.2},
    "after SAM": {"rho": 0.2},
    "after SAM accumulated": {"rho": 0.2, "accumulate": 2},
    "before SAM": {"rho": 0.2, "sam_first": False},
    "before SAM accumulated": {"rho": 0.2, "sam_first": False, "accumulate": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_equals_the_loop_by_hand(method: Method, lab: Lab, name: str) -> None:
    """Buffers included. With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    settings = lab.settings(**SETTINGS[name])
    callbacks = [SharpnessAwareMinimization(settings.rho), method.callback()]
    module, trainer = method.module(), lab.trainer(*callbacks[:: 1 if settings.sam_first else -1], settings=settings)
    trainer.fit(module, method.loader())
    expected = method.by_hand(settings)
    atol = method.half_atol if settings.exponent and settings.rho else method.atol
    lab.assert_equal_states(module.net, expected.net, atol)
    if settings.exponent:
        scale = trainer.precision_plugin.scaler.get_scale()  # type: ignore[attr-defined]
        assert scale == expected.scaler.get_scale()
        assert (scale < 2.0**settings.exponent) == (settings.exponent > 10)


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_makes_a_difference(method: Method, lab: Lab, rho: float, accumulate: int) -> None:
    """To the plain run, and to what the loop by hand gives without SAM's other weights."""
    settings = lab.settings(accumulate=accumulate, rho=rho)
    module, plain = method.module(), method.module()
    lab.trainer(SharpnessAwareMinimization(rho), settings=settings).fit(plain, method.loader())
    net = method.by_hand(settings).net
    assert lab.distance(net, plain.net) > 1e-4
    assert lab.distance(net, module.net) > 1e-3
    if rho:
        assert lab.distance(net, method.by_hand(lab.settings(accumulate=accumulate)).net) > 1e-3


def test_zero_strength_is_the_plain_run(method: Method, lab: Lab) -> None:
    if method.name == "a-gem":
        pytest.skip("has no strength")
    module, plain, callback = method.module(), method.module(), method.faint(0.0)
    trainer = lab.trainer(callback)
    trainer.fit(module, method.loader())
    lab.trainer().fit(plain, method.loader())
    lab.assert_equal_states(module, plain, atol=0)
    assert not trainer.callback_metrics
    assert module.modes == plain.modes == [True] * 10
    # Neither anchor nor importance, nor a sample in a buffer.
    assert all(not part or part["seen"] == 0 for part in callback.state_dict().values())


class Unseeded(LightningModule):
    """Draws the masks from the global state; one of its layers stays in evaluation mode."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Leave the global state alone."""

    def on_train_start(self) -> None:
        self.get_submodule("net.1").eval()


class SeedsPython(Callback):
    """Before the data of the previous task is read, which draws."""

    def on_fit_start(self, trainer: object, pl_module: object) -> None:
        random.seed(3)
        np.random.seed(3)


def test_leaves_no_trace(method: Method, lab: Lab) -> None:
    """A strength that changes no weight leaves the plain run: buffers, random numbers, modes, flags, hooks."""
    if method.name == "a-gem":
        pytest.skip("has no strength")
    runs: list[tuple[LightningModule, list[object]]] = []
    for callbacks in ([], [method.faint(1e-30)]):
        module = method.module(Unseeded)
        if method.uniform:  # the samples of a buffer pass through BatchNorm too
            module.net.register_module("1", nn.Identity())
        torch.manual_seed(3)
        lab.trainer(SeedsPython(), *callbacks).fit(module, method.loader(shuffle=True))
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
        modes = [part.training for part in module.modules()]
        flags = [p.requires_grad for p in module.parameters()]
        runs.append((module, [drawn, modes, flags]))
        assert not module._forward_hooks
        assert not all(modes)
        assert not module.frozen.weight.requires_grad
    lab.assert_equal_states(runs[0][0], runs[1][0], atol=0)
    assert runs[0][1] == runs[1][1]


def equal(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return first == second


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_goes_on(method: Method, lab: Lab, tmp_path: Path, accumulate: int) -> None:
    """Without measuring or filling again, which would fail."""
    whole, resumed, path = method.module(), method.module(), tmp_path / "first.ckpt"
    callback, again = method.callback(), method.resumed()
    lab.trainer(callback, lab.saves_first_epoch(path), accumulate=accumulate).fit(whole, method.loader())
    lab.trainer(again, accumulate=accumulate).fit(resumed, method.loader(), ckpt_path=path, weights_only=True)
    lab.assert_equal_states(resumed.net, whole.net, atol=0)
    assert callback.state_dict()
    assert equal(callback.state_dict(), again.state_dict())


class Manual(LightningModule):
    """Its user steps."""

    def setup(self, stage: str) -> None:
        self.automatic_optimization = False


class SecondOrder(LightningModule):
    """Its optimizer compares losses."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.get_submodule("net").parameters())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Manual, "` needs automatic optimization, but `Manual` sets `automatic_optimization = False`. Remove"),
        (SecondOrder, "which LBFGS compares. Use another optimizer"),
    ],
)
def test_unsuitable_modules_are_refused(method: Method, lab: Lab, kind: type[LightningModule], message: str) -> None:
    callback, trainer = method.callback(), lab.trainer()
    trainer.callbacks = [callback]  # type: ignore[attr-defined]
    with pytest.raises(MisconfigurationException, match=f"`{type(callback).__name__}.*{message}"):
        trainer.fit(method.module(kind), method.loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_split_parameters_are_refused(method: Method, lab: Lab, strategy: type[Strategy]) -> None:
    trainer = lab.trainer()
    # Built without __init__, which needs packages and devices that are not at hand.
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=rf"does not support `{strategy.__name__}`. Use .*=\"ddp\""):
        method.callback().setup(trainer, method.module(), "fit")


def test_ddp_and_other_stages_are_not_refused(method: Method, lab: Lab) -> None:
    trainer, manual = lab.trainer(), method.module()
    manual.automatic_optimization = False
    trainer._accelerator_connector.strategy = DDPStrategy()
    method.callback().setup(trainer, method.module(), "fit")
    method.callback().setup(trainer, manual, "test")
