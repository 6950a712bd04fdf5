"""A term of the loss through a Trainer against loops written by hand; the module knows nothing of it."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.callbacks import ElasticWeightConsolidation, SharpnessAwareMinimization
from lightning_bd.callbacks.loss_term import LossTerm

if TYPE_CHECKING:
    from tests.callbacks.conftest import At, Batch, Lab, Settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

STRENGTH = 0.3


class CallsSubmodule(LightningModule):
    """The module's own ``forward`` is not part of the step."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self.get_submodule("net")(batch[0]), batch[1])


class Confidence(LossTerm):
    """Not linear in the batch, and of another size in every one."""

    log_name: ClassVar[str] = "confidence"

    def __init__(self, strength: float = STRENGTH) -> None:
        super().__init__(strength)
        self.computed = 0

    def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
        self.computed += 1
        return confidence(self.logits(pl_module, batch))


def confidence(logits: Tensor) -> Tensor:
    return logits.float().square().mean().sqrt()


def loop_by_hand(lab: Lab, settings: Settings | None = None, again: bool = False) -> tuple[nn.Module, float]:
    """On loss plus term, and the scale that is left. With ``again`` the term has a forward pass of its own, which
    leaves buffers and random numbers alone."""
    net = lab.net()

    def loss(batch: Batch, at: At) -> Tensor:
        logits = net(batch[0])
        value = F.cross_entropy(logits, batch[1])
        if again:
            buffers = [b.clone() for b in net.buffers()]
            logits = net(batch[0])
            for now, before in zip(net.buffers(), buffers, strict=True):
                now.data.copy_(before)  # behind the back of autograd, which kept them
        return value + STRENGTH * confidence(logits)

    return net, lab.by_hand(net, lab.batches(), loss, settings).get_scale()


@pytest.mark.parametrize("hooks", [(), (CallsSubmodule,)])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"accumulate": 2},
        {"clip": 0.5},
        {"accumulate": 2, "clip": 0.5},
        {"bf16": True, "accumulate": 2, "clip": 1.0},
        {"exponent": 10, "accumulate": 2},
        {"exponent": 40, "accumulate": 2},
        {"exponent": 10, "accumulate": 2, "rho": 0.2},
        {"rho": 0.2},
        {"rho": 0.2, "accumulate": 2},
        {"rho": 0.2, "sam_first": False},
        {"rho": 0.2, "sam_first": False, "accumulate": 2},
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_equals_the_term_in_the_loss(
    lab: Lab, values: dict[str, Any], hooks: tuple[type[LightningModule], ...]
) -> None:
    """With the large scale the first steps overflow and are skipped; SAM's second pass of a batch has its own term."""
    settings, module, plain = lab.settings(**values), lab.module(*hooks), lab.module(*hooks)
    sam = [SharpnessAwareMinimization(settings.rho)] if settings.rho else []
    callbacks = [*sam, Confidence()]
    trainer = lab.trainer(*callbacks[:: 1 if settings.sam_first else -1], settings=settings)
    trainer.fit(module, lab.loader(lab.batches()))
    expected, scale = loop_by_hand(lab, settings, bool(hooks))
    lab.assert_equal_states(module.net, expected, atol=1e-5 if sam and settings.exponent else 2e-6)
    # No forward pass but that of the step, or the one that the term asks for in its place.
    assert len(module.modes) == (20 if sam else 10)
    if settings.exponent:
        assert trainer.precision_plugin.scaler.get_scale() == scale  # type: ignore[attr-defined]
        assert (scale < 2.0**settings.exponent) == (settings.exponent > 10)
    else:
        lab.trainer(*sam, settings=settings).fit(plain, lab.loader(lab.batches()))
        assert lab.distance(module.net, plain.net) > 1e-3
    if sam:
        assert (
            lab.distance(module.net, loop_by_hand(lab, lab.settings(**{**values, "rho": 0.0}), bool(hooks))[0]) > 1e-3
        )


def test_two_terms_and_a_penalty_of_the_weights(lab: Lab) -> None:
    """Half and half is the whole."""
    module = lab.module()
    data = [(x, y) for x, y in lab.batches()]
    ewc = ElasticWeightConsolidation(strength=1e-30, dataloader=data)

    class Other(Confidence):
        log_name: ClassVar[str] = "other"

    trainer = lab.trainer(Confidence(STRENGTH / 3), ewc, Other(STRENGTH * 2 / 3), accumulate=2)
    trainer.fit(module, lab.loader(lab.batches()))
    lab.assert_equal_states(module.net, loop_by_hand(lab, lab.settings(accumulate=2))[0])
    assert trainer.callback_metrics["other/penalty"] == pytest.approx(
        2 * float(trainer.callback_metrics["confidence/penalty"])
    )


def test_zero_strength_is_the_plain_run(lab: Lab) -> None:
    module, plain, callback = lab.module(), lab.module(), Confidence(strength=0)
    trainer = lab.trainer(callback)
    trainer.fit(module, lab.loader(lab.batches()))
    lab.trainer().fit(plain, lab.loader(lab.batches()))
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    assert not trainer.callback_metrics
    assert callback.computed == 0
    assert len(module.modes) == len(plain.modes)


class Unseeded(LightningModule):
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw the masks from the global state."""


class Draws(Confidence):
    """A term with noise of its own."""

    def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
        return super().compute(trainer, pl_module, batch) * torch.rand(())


@pytest.mark.parametrize("hooks", [(Unseeded,), (Unseeded, CallsSubmodule)])
def test_leaves_no_trace(lab: Lab, hooks: tuple[type[LightningModule], ...]) -> None:
    """A strength so small that it changes no weight leaves the plain run: buffers, random numbers, hooks, modes."""
    runs = []
    for callbacks in ([], [Draws(strength=1e-30)]):
        module = lab.module(*hooks)
        torch.manual_seed(3)
        lab.trainer(*callbacks).fit(module, lab.loader(lab.batches(), shuffle=True))
        runs.append((module, torch.rand(())))
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert runs[0][1] == runs[1][1]
    assert not runs[1][0]._forward_hooks
    assert (callbacks[0]._batch, callbacks[0]._penalty, callbacks[0]._capture._images) == (None, None, None)


@pytest.mark.parametrize("broken", ["step", "term"])
def test_exception_leaves_no_trace(lab: Lab, broken: str) -> None:
    class Fails(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            if broken == "step":
                raise OSError("broken")
            return super().training_step(batch, batch_idx)

    class FailsToo(Confidence):
        def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
            super().compute(trainer, pl_module, batch)
            raise OSError("broken")

    callback, module = FailsToo(), lab.module(Fails, CallsSubmodule)
    buffers = copy.deepcopy(dict(module.named_buffers()))
    with pytest.raises(OSError, match="broken"):
        lab.trainer(callback).fit(module, lab.loader(lab.batches()))
    assert not module._forward_hooks
    assert (callback._batch, callback._capture._images, callback._handle) == (None, None, None)
    if broken == "term":
        reference = lab.net()
        reference(lab.batches()[0][0])
        lab.assert_equal_states(module.net, reference)  # the statistics of one pass
    else:
        assert all(torch.equal(value, buffers[name]) for name, value in module.named_buffers())


def test_second_fit_watches_once(lab: Lab) -> None:
    module, callback = lab.module(), Confidence()
    for _ in range(2):
        lab.trainer(callback, epochs=1).fit(module, lab.loader(lab.batches()))
    again = lab.module()
    for _ in range(2):
        lab.trainer(Confidence(), epochs=1).fit(again, lab.loader(lab.batches()))
    lab.assert_equal_states(module.net, again.net, atol=0)
    assert callback.computed == 10


class WritesLogits(LightningModule):
    """What it makes of its logits in place is not what its ``forward`` gives."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        logits = self(batch[0])
        loss = F.cross_entropy(logits.clone(), batch[1])
        logits.mul_(100)
        return loss


class LooksFirst(LightningModule):
    """Asks for pseudo-labels without a graph before and after the call that the loss comes from."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        state = torch.get_rng_state()
        with torch.no_grad():
            self.get_submodule("net").eval()
            self(batch[0])
            self.get_submodule("net").train()
        torch.set_rng_state(state)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        with torch.no_grad():
            self.get_submodule("net").eval()
            self(batch[0])
            self.get_submodule("net").train()
        return loss


class Augments(LightningModule):
    """Its images are not those of the batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0].clone()), batch[1])


@pytest.mark.parametrize(("kind", "again"), [(WritesLogits, True), (LooksFirst, False), (Augments, True)])
def test_takes_the_logits_of_the_step_or_asks_again(lab: Lab, kind: type[LightningModule], again: bool) -> None:
    module = lab.module(kind)
    lab.trainer(Confidence()).fit(module, lab.loader(lab.batches()))
    lab.assert_equal_states(module.net, loop_by_hand(lab, again=again)[0])


def test_frozen_batch_norm_in_evaluation_mode(lab: Lab) -> None:
    """Autograd keeps the statistics of such a layer for the backward pass: they must not be written to."""

    class Frozen(LightningModule):
        def on_train_start(self) -> None:
            self.get_submodule("net.1").eval()

    module = lab.module(Frozen, CallsSubmodule)
    lab.trainer(Confidence()).fit(module, lab.loader(lab.batches()))
    assert int(module.net.state_dict()["1.num_batches_tracked"]) == 0
    assert lab.distance(module.net, lab.net()) > 1e-3


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # once a process
def test_steps_without_a_loss_are_skipped(lab: Lab) -> None:
    class Skips(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    callback = Confidence()
    lab.trainer(callback, epochs=1).fit(lab.module(Skips), lab.loader(lab.batches()))
    assert callback.computed == 4


def test_term_without_images(lab: Lab) -> None:
    """A term of the weights alone asks nothing of the batch."""

    class Decay(LossTerm):
        log_name: ClassVar[str] = "decay"

        def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
            assert isinstance(batch, dict)
            return torch.stack([p.square().sum() for p in pl_module.get_submodule("net").parameters()]).sum() / 2

    class TakesDictionaries(LightningModule):
        def on_before_batch_transfer(self, batch: Batch | dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
            return batch if isinstance(batch, dict) else {"x": batch[0], "y": batch[1]}

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
            return F.cross_entropy(self(batch["x"]), batch["y"])

    class Decays(LightningModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.get_submodule("net").parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    module, expected = lab.module(TakesDictionaries), lab.module(Decays)
    lab.trainer(Decay(0.1)).fit(module, lab.loader(lab.batches()))
    lab.trainer().fit(expected, lab.loader(lab.batches()))
    lab.assert_equal_states(module.net, expected.net)
    with pytest.raises(
        MisconfigurationException, match=r"from `batch\[0\]`, but the batch is a `dict`. Let .*\(images, labels\)"
    ):
        lab.trainer(Confidence()).fit(lab.module(TakesDictionaries), lab.loader(lab.batches()))


def test_module_without_logits_is_refused(lab: Lab) -> None:
    class GivesPairs(LightningModule):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.get_submodule("net")(x)

    with pytest.raises(
        MisconfigurationException, match=r"logits \(B, K\), but the `forward` of `GivesPairs` .* Let it map images"
    ):
        lab.trainer(Confidence()).fit(lab.module(GivesPairs, CallsSubmodule), lab.loader(lab.batches()))


@pytest.mark.parametrize("sam", [False, True])
def test_penalty_and_share_are_logged(lab: Lab, sam: bool) -> None:
    """Of the last batch, before the step and at the weights, not at those that SAM perturbs."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Remembers(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            if not callbacks[0].second_pass:
                seen.append((loss.detach(), STRENGTH * confidence(logits.detach())))
            return loss

    callbacks = [SharpnessAwareMinimization(rho=0.2 if sam else 0.0)]
    trainer = lab.trainer(*callbacks, Confidence(), accumulate=2)
    trainer.fit(lab.module(Remembers), lab.loader(lab.batches()))
    loss, penalty = seen[-1]
    torch.testing.assert_close(trainer.callback_metrics["confidence/penalty"], penalty)
    torch.testing.assert_close(trainer.callback_metrics["confidence/share"], penalty / (loss + penalty))


def test_logs_when_the_loggers_do(lab: Lab, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = lab.trainer(Confidence(), epochs=3, accumulate=2, logger=logger, log_every=4)
    module = lab.module()
    with patch.object(type(module), "log", autospec=True, side_effect=LightningModule.log) as log:
        trainer.fit(module, lab.loader(lab.batches()))
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["confidence/penalty"]]
    assert [row["step"] for row in rows] == ["3", "7"]  # of nine steps, counted from 0
    assert all(float(row["confidence/penalty"]) > 0 and 0 < float(row["confidence/share"]) < 1 for row in rows)
    assert log.call_count == 4


class Manual(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False


class ManualFromSetupOn(LightningModule):
    def setup(self, stage: str) -> None:
        self.automatic_optimization = False


class SecondOrder(LightningModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.get_submodule("net").parameters())


class DrawsItself(LightningModule):
    def training_step(self, dataloader_iter: Iterator[object]) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Manual, "needs automatic optimization, but `Manual` sets `automatic_optimization = False`. Remove that"),
        (ManualFromSetupOn, "needs automatic optimization"),
        (SecondOrder, "not to that which LBFGS compares. Use another optimizer"),
        (DrawsItself, r"`training_step\(dataloader_iter\)` draws it itself. Use `training_step\(batch, batch_idx\)`"),
    ],
)
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_unsuitable_modules_are_refused(lab: Lab, kind: type[LightningModule], message: str) -> None:
    trainer = lab.trainer(Confidence())
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(lab.module(kind), lab.loader(lab.batches()))
    assert trainer.global_step == 0


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_split_parameters_are_refused(lab: Lab, strategy: type[Strategy]) -> None:
    trainer = lab.trainer()
    # Built without __init__, which needs packages and devices that are not at hand.
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=rf"does not support `{strategy.__name__}`. Use .*=\"ddp\""):
        Confidence().setup(trainer, lab.module(), "fit")


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_that_looks_for_unused_parameters_is_refused(lab: Lab, unused: bool) -> None:
    trainer = lab.trainer()
    trainer._accelerator_connector.strategy = DDPStrategy(find_unused_parameters=unused)
    raises = pytest.raises(
        MisconfigurationException, match=r"`find_unused_parameters=True`. Use `Trainer\(strategy=\"ddp\"\)`, and set"
    )
    with raises if unused else nullcontext():
        Confidence().setup(trainer, lab.module(), "fit")


def test_other_stages_are_not_refused(lab: Lab) -> None:
    Confidence().setup(lab.trainer(), lab.module(Manual), "test")


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_strength_is_checked(strength: float) -> None:
    with pytest.raises(ValueError, match=f"`strength` to be a non-negative float, but got {strength}"):
        Confidence(strength)
