"""A term of the loss through a Trainer against loops written by hand; the module knows nothing of it."""

import copy
import csv
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar, Literal
from unittest.mock import patch

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks import ElasticWeightConsolidation, SharpnessAwareMinimization
from lightning_bd.callbacks.loss_term import LossTerm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
STRENGTH = 0.3


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
    )


def make_batches() -> list[Batch]:
    """Five batches of eight images: with two in a step, the last step has one."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 8, 1, 6, 6, generator=generator)
    return list(zip(images, torch.randint(3, (5, 8), generator=generator), strict=True))


def make_loader(shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8, shuffle=shuffle)


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.net(x)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


class CallsSubmodule(Module):
    """The module's own ``forward`` is not part of the step."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self.net(batch[0]), batch[1])


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


def loop_by_hand(
    again: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rho: float = 0.0,
    seeded: bool = True,
) -> nn.Module:
    """Two epochs of plain PyTorch on loss plus term; with ``rho``, at the weights that SAM perturbs.

    With ``again`` the term has a forward pass of its own, which leaves buffers and random numbers alone.
    """
    net = make_net()
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches = list(enumerate(make_batches()))
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]

    def backward(window: list[tuple[int, Batch]]) -> None:
        opt.zero_grad()
        for index, (images, labels) in window:
            torch.manual_seed(100 + index)
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False):
                logits = net(images)
                loss = F.cross_entropy(logits, labels)
                if again:
                    buffers = [b.clone() for b in net.buffers()]
                    logits = net(images)
                    for now, before in zip(net.buffers(), buffers, strict=True):
                        now.data.copy_(before)  # behind the back of autograd, which kept them
                loss = loss + STRENGTH * confidence(logits)
            # Lightning divides by `accumulate` in a shorter last window too.
            scaler.scale(loss / accumulate).backward()  # type: ignore[no-untyped-call]

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
@pytest.mark.parametrize("kind", [Module, CallsSubmodule])
def test_equals_the_term_in_the_loss(kind: type[Module], accumulate: int, clip: float | None) -> None:
    module, plain, again = kind(), kind(), kind is CallsSubmodule
    make_trainer(Confidence(), accumulate=accumulate, clip=clip).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(again, accumulate, clip))
    make_trainer(accumulate=accumulate, clip=clip).fit(plain, make_loader())
    assert distance(module.net, plain.net) > 1e-3
    # No forward pass but that of the step, or the one that the term asks for in its place.
    assert module.calls == 10


@pytest.mark.parametrize("kind", [Module, CallsSubmodule])
def test_bf16(kind: type[Module]) -> None:
    module = kind()
    make_trainer(Confidence(), precision="bf16-mixed", accumulate=2, clip=1.0).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(kind is CallsSubmodule, 2, 1.0, torch.bfloat16))


@pytest.mark.parametrize("exponent", [10, 40])
@pytest.mark.parametrize("kind", [Module, CallsSubmodule])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(kind: type[Module], exponent: int) -> None:
    """With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    module = kind()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    make_trainer(Confidence(), scaler=scaler, accumulate=2).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(kind is CallsSubmodule, 2, None, torch.float16, by_hand), atol=2e-6)
    assert scaler.get_scale() == by_hand.get_scale()
    assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("term_first", [True, False])
@pytest.mark.parametrize("kind", [Module, CallsSubmodule])
def test_counts_in_both_passes_of_sam(kind: type[Module], term_first: bool, accumulate: int) -> None:
    """Each replayed batch is given its own term."""
    module, again = kind(), kind is CallsSubmodule
    callbacks: list[Callback] = [SharpnessAwareMinimization(rho=0.2), Confidence()]
    make_trainer(*callbacks[:: -1 if term_first else 1], accumulate=accumulate).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(again, accumulate, rho=0.2))
    assert distance(module.net, loop_by_hand(again, accumulate)) > 1e-3


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_sam_with_a_scaler() -> None:
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    callbacks = SharpnessAwareMinimization(rho=0.2), Confidence()
    make_trainer(*callbacks, scaler=scaler, accumulate=2).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(False, 2, None, torch.float16, by_hand, rho=0.2), atol=1e-5)


def test_two_terms_and_a_penalty_of_the_weights() -> None:
    """Half and half is the whole."""
    module = Module()
    data = [(x, y) for x, y in make_batches()]
    ewc = ElasticWeightConsolidation(strength=1e-30, dataloader=data)

    class Other(Confidence):
        log_name: ClassVar[str] = "other"

    trainer = make_trainer(Confidence(STRENGTH / 3), ewc, Other(STRENGTH * 2 / 3), accumulate=2)
    trainer.fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate=2))
    assert trainer.callback_metrics["other/penalty"] == pytest.approx(
        2 * float(trainer.callback_metrics["confidence/penalty"])
    )


def test_zero_strength_is_the_plain_run() -> None:
    module, plain, callback = Module(), Module(), Confidence(strength=0)
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    make_trainer().fit(plain, make_loader())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    assert not trainer.callback_metrics
    assert callback.computed == 0
    assert module.calls == plain.calls


class Unseeded(Module):
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw the masks from the global state."""


class UnseededCallsSubmodule(CallsSubmodule, Unseeded):
    """Draw the masks from the global state, twice."""


class Draws(Confidence):
    """A term with noise of its own."""

    def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
        return super().compute(trainer, pl_module, batch) * torch.rand(())


@pytest.mark.parametrize("kind", [Unseeded, UnseededCallsSubmodule])
def test_leaves_no_trace(kind: type[Module]) -> None:
    """A strength so small that it changes no weight leaves the plain run: buffers, random numbers, hooks, modes."""
    runs = []
    for callbacks in ([], [Draws(strength=1e-30)]):
        module = kind()
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, make_loader(shuffle=True))
        runs.append((module, torch.rand(())))
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert runs[0][1] == runs[1][1]
    assert not runs[1][0]._forward_hooks
    assert (callbacks[0]._batch, callbacks[0]._penalty, callbacks[0]._capture._images) == (None, None, None)


@pytest.mark.parametrize("broken", ["step", "term"])
def test_exception_leaves_no_trace(broken: str) -> None:
    class Fails(CallsSubmodule):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            if broken == "step":
                raise OSError("broken")
            return super().training_step(batch, batch_idx)

    class FailsToo(Confidence):
        def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
            super().compute(trainer, pl_module, batch)
            raise OSError("broken")

    callback, module = FailsToo(), Fails()
    buffers = copy.deepcopy(dict(module.named_buffers()))
    with pytest.raises(OSError, match="broken"):
        make_trainer(callback).fit(module, make_loader())
    assert not module._forward_hooks
    assert (callback._batch, callback._capture._images, callback._handle) == (None, None, None)
    if broken == "term":
        reference = make_net()
        reference(make_batches()[0][0])
        assert_equal_states(module.net, reference)  # the statistics of one pass
    else:
        assert all(torch.equal(value, buffers[name]) for name, value in module.named_buffers())


def test_second_fit_watches_once() -> None:
    module, callback = Module(), Confidence()
    for _ in range(2):
        make_trainer(callback, epochs=1).fit(module, make_loader())
    again = Module()
    for _ in range(2):
        make_trainer(Confidence(), epochs=1).fit(again, make_loader())
    assert_equal_states(module.net, again.net, atol=0)
    assert callback.computed == 10


class WritesLogits(Module):
    """What it makes of its logits in place is not what its ``forward`` gives."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        logits = self(batch[0])
        loss = F.cross_entropy(logits.clone(), batch[1])
        logits.mul_(100)
        return loss


class LooksFirst(Module):
    """Asks for pseudo-labels without a graph before and after the call that the loss comes from."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        state = torch.get_rng_state()
        with torch.no_grad():
            self.net.eval()
            self(batch[0])
            self.net.train()
        torch.set_rng_state(state)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        with torch.no_grad():
            self.net.eval()
            self(batch[0])
            self.net.train()
        return loss


class Augments(Module):
    """Its images are not those of the batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0].clone()), batch[1])


@pytest.mark.parametrize(("kind", "again"), [(WritesLogits, True), (LooksFirst, False), (Augments, True)])
def test_takes_the_logits_of_the_step_or_asks_again(kind: type[Module], again: bool) -> None:
    module = kind()
    make_trainer(Confidence()).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(again))


def test_frozen_batch_norm_in_evaluation_mode() -> None:
    """Autograd keeps the statistics of such a layer for the backward pass: they must not be written to."""

    class Frozen(CallsSubmodule):
        def on_train_start(self) -> None:
            self.net[1].eval()  # type: ignore[index]

    module = Frozen()
    make_trainer(Confidence()).fit(module, make_loader())
    assert int(module.net.state_dict()["1.num_batches_tracked"]) == 0
    assert distance(module.net, make_net()) > 1e-3


def test_steps_without_a_loss_are_skipped() -> None:
    class Skips(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    callback = Confidence()
    with pytest.warns(UserWarning, match="returned `None`"):
        make_trainer(callback, epochs=1).fit(Skips(), make_loader())
    assert callback.computed == 4


def test_term_without_images() -> None:
    """A term of the weights alone asks nothing of the batch."""

    class Decay(LossTerm):
        log_name: ClassVar[str] = "decay"

        def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
            assert isinstance(batch, dict)
            return torch.stack([p.square().sum() for p in pl_module.parameters()]).sum() / 2

    class TakesDictionaries(Module):
        def on_before_batch_transfer(self, batch: Batch | dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
            return batch if isinstance(batch, dict) else {"x": batch[0], "y": batch[1]}

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:  # type: ignore[override]
            return F.cross_entropy(self(batch["x"]), batch["y"])

    class Decays(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    module, expected = TakesDictionaries(), Decays()
    make_trainer(Decay(0.1)).fit(module, make_loader())
    make_trainer().fit(expected, make_loader())
    assert_equal_states(module.net, expected.net)
    with pytest.raises(
        MisconfigurationException, match=r"from `batch\[0\]`, but the batch is a `dict`. Let .*\(images, labels\)"
    ):
        make_trainer(Confidence()).fit(TakesDictionaries(), make_loader())


def test_module_without_logits_is_refused() -> None:
    class GivesPairs(CallsSubmodule):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x, self.net(x)

    with pytest.raises(
        MisconfigurationException, match=r"logits \(B, K\), but the `forward` of `GivesPairs` .* Let it map images"
    ):
        make_trainer(Confidence()).fit(GivesPairs(), make_loader())


@pytest.mark.parametrize("sam", [False, True])
def test_penalty_and_share_are_logged(sam: bool) -> None:
    """Of the last batch, before the step and at the weights, not at those that SAM perturbs."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Remembers(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            if not callbacks[0].second_pass:
                seen.append((loss.detach(), STRENGTH * confidence(logits.detach())))
            return loss

    callbacks = [SharpnessAwareMinimization(rho=0.2 if sam else 0.0)]
    trainer = make_trainer(*callbacks, Confidence(), accumulate=2)
    trainer.fit(Remembers(), make_loader())
    loss, penalty = seen[-1]
    torch.testing.assert_close(trainer.callback_metrics["confidence/penalty"], penalty)
    torch.testing.assert_close(trainer.callback_metrics["confidence/share"], penalty / (loss + penalty))


def test_logs_when_the_loggers_do(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        callbacks=[Confidence()], max_epochs=3, accumulate_grad_batches=2, accelerator="cpu", logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=4,
    )  # fmt: skip
    with patch.object(Module, "log", autospec=True, side_effect=LightningModule.log) as log:
        trainer.fit(Module(), make_loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["confidence/penalty"]]
    assert [row["step"] for row in rows] == ["3", "7"]  # of nine steps, counted from 0
    assert all(float(row["confidence/penalty"]) > 0 and 0 < float(row["confidence/share"]) < 1 for row in rows)
    assert log.call_count == 4


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class ManualFromSetupOn(Module):
    def setup(self, stage: str) -> None:
        self.automatic_optimization = False


class SecondOrder(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.net.parameters())


class DrawsItself(Module):
    def training_step(self, dataloader_iter: Iterator[object]) -> Tensor:  # type: ignore[override]
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
def test_unsuitable_modules_are_refused(kind: type[Module], message: str) -> None:
    trainer = make_trainer(Confidence())
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(kind(), make_loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_split_parameters_are_refused(strategy: type[Strategy]) -> None:
    trainer = make_trainer()
    # Built without __init__, which needs packages and devices that are not at hand.
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=rf"does not support `{strategy.__name__}`. Use .*=\"ddp\""):
        Confidence().setup(trainer, Module(), "fit")


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_that_looks_for_unused_parameters_is_refused(unused: bool) -> None:
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = DDPStrategy(find_unused_parameters=unused)
    raises = pytest.raises(
        MisconfigurationException, match=r"`find_unused_parameters=True`. Use `Trainer\(strategy=\"ddp\"\)`, and set"
    )
    with raises if unused else nullcontext():
        Confidence().setup(trainer, Module(), "fit")


def test_other_stages_are_not_refused() -> None:
    Confidence().setup(make_trainer(), Manual(), "test")


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_strength_is_checked(strength: float) -> None:
    with pytest.raises(ValueError, match=f"`strength` to be a non-negative float, but got {strength}"):
        Confidence(strength)
