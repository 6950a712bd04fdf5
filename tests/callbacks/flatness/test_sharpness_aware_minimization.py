"""SAM through a Trainer against loops written by hand; the module knows nothing of SAM."""

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.callbacks.isolation import overwrite

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
Variant = Literal["sam", "asam", "gsam", "looksam"]
Step = Callable[[list[Tensor], Callable[[], None]], None]


def make_net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "cnn":
        convolutions = [
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        ]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 3))
    dropout = nn.Dropout(0.5 if kind == "dropout" else 0.0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), dropout, nn.Linear(16, 3))


def make_batches() -> list[Batch]:
    """Six batches of eight images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 8, 1, 8, 8, generator=generator)
    labels = torch.randint(3, (6, 8), generator=generator)
    return list(zip(images, labels, strict=True))


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self, net: nn.Module, optimizer: str = "sgd", lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.optimizer_name, self.lr = net, optimizer, lr

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.net, self.optimizer_name, self.lr)
        if self.optimizer_name == "sgd":
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_optimizer(net: nn.Module, name: str = "sgd", lr: float = 0.1) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(net.parameters(), lr=lr)


def make_trainer(
    *callbacks: Callback,
    epochs: int = 1,
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


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    images, labels = (torch.cat(column) for column in zip(*make_batches(), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def fit(
    module: LightningModule,
    *callbacks: Callback,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["bf16-mixed"] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Trainer:
    trainer = make_trainer(*callbacks, accumulate=accumulate, clip=clip, precision=precision, scaler=scaler)
    trainer.fit(module, make_loader())
    return trainer


def loop_by_hand(
    net: nn.Module,
    step: Step,
    optimizer: str = "sgd",
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> None:
    """Plain PyTorch: ``step`` turns the gradients at the weights into those that the optimizer takes."""
    opt = make_optimizer(net, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5) if optimizer != "sgd" else None
    batches = list(enumerate(make_batches()))
    for start in range(0, len(batches), accumulate):

        def compute(window: list[tuple[int, Batch]] = batches[start : start + accumulate]) -> None:
            opt.zero_grad()
            for index, (images, labels) in window:
                torch.manual_seed(100 + index)
                with torch.autocast("cpu", dtype=dtype, cache_enabled=False) if dtype else nullcontext():
                    loss = F.cross_entropy(net(images), labels)
                loss = loss if penalty is None else loss + penalty(net)
                loss = loss / accumulate
                torch.autograd.backward(loss if scaler is None else scaler.scale(loss))

        compute()
        buffers = copy.deepcopy(dict(net.named_buffers()))
        step(list(net.parameters()), compute)
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
        if scaler is not None:
            scaler.unscale_(opt)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
        if scheduler is not None:
            scheduler.step()


def norm(tensors: list[Tensor]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))
    return length


def gradients_of(parameters: list[Tensor]) -> list[Tensor]:
    return [cast(Tensor, parameter.grad).clone() for parameter in parameters]


def set_gradients(parameters: list[Tensor], vector: Tensor) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, torch.split(vector, sizes), strict=True):
        cast(Tensor, parameter.grad).copy_(part.view_as(parameter))


@torch.no_grad()
def at_perturbed(parameters: list[Tensor], compute: Callable[[], None], perturbation: list[Tensor]) -> None:
    before = [parameter.clone() for parameter in parameters]
    for parameter, part in zip(parameters, perturbation, strict=True):
        parameter.add_(part)
    with torch.enable_grad():
        compute()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)


def sam(rho: float = 0.05, skip_infinite: bool = False) -> Step:
    def step(parameters: list[Tensor], compute: Callable[[], None]) -> None:
        gradients = gradients_of(parameters)
        length = norm(gradients)
        if skip_infinite and not torch.isfinite(length):
            return
        at_perturbed(parameters, compute, [gradient * (rho / (length + 1e-12)) for gradient in gradients])

    return step


def asam(rho: float = 0.5, eta: float = 0.01) -> Step:
    def step(parameters: list[Tensor], compute: Callable[[], None]) -> None:
        gradients = gradients_of(parameters)
        operator = [p.detach().abs() + eta if p.ndim > 1 else torch.ones_like(p) for p in parameters]
        length = norm([t * g for t, g in zip(operator, gradients, strict=True)])
        scale = rho / (length + 1e-12)
        at_perturbed(parameters, compute, [t * g * t * scale for t, g in zip(operator, gradients, strict=True)])

    return step


def gsam(rho: float = 0.05, alpha: float = 0.3) -> Step:
    def step(parameters: list[Tensor], compute: Callable[[], None]) -> None:
        g = torch.cat([gradient.flatten() for gradient in gradients_of(parameters)])
        sam(rho)(parameters, compute)
        s = torch.cat([gradient.flatten() for gradient in gradients_of(parameters)])
        unit = s / s.norm()
        set_gradients(parameters, s - alpha * (g - (g @ unit) * unit))

    return step


def looksam(rho: float = 0.05, alpha: float = 0.7, interval: int = 2) -> Step:
    calls, v = 0, torch.empty(0)

    def step(parameters: list[Tensor], compute: Callable[[], None]) -> None:
        nonlocal calls, v
        g = torch.cat([gradient.flatten() for gradient in gradients_of(parameters)])
        if calls % interval == 0:
            sam(rho)(parameters, compute)
            s = torch.cat([gradient.flatten() for gradient in gradients_of(parameters)])
            v = s - s.norm() * F.cosine_similarity(g, s, dim=0) * g / g.norm()
        else:
            set_gradients(parameters, g + alpha * g.norm() / v.norm() * v)
        calls += 1

    return step


def every(interval: int, inner: Step) -> Step:
    calls = 0

    def step(parameters: list[Tensor], compute: Callable[[], None]) -> None:
        nonlocal calls
        if calls % interval == 0:
            inner(parameters, compute)
        calls += 1

    return step


def assert_equal_states(actual: nn.Module, expected: nn.Module, atol: float = 0.0) -> None:
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["mlp", "dropout", "cnn"])
def test_equals_the_loop_by_hand(kind: str, accumulate: int, clip: float | None) -> None:
    module, expected = Module(make_net(kind)), make_net(kind)
    trainer = fit(module, SharpnessAwareMinimization(), accumulate=accumulate, clip=clip)
    loop_by_hand(expected, sam(), accumulate=accumulate, clip=clip)
    assert_equal_states(module.net, expected)
    assert trainer.global_step == 6 // accumulate


def test_differs_from_the_plain_run() -> None:
    module, plain = Module(make_net("mlp")), Module(make_net("mlp"))
    fit(module, SharpnessAwareMinimization())
    fit(plain)
    assert max((a - b).abs().max() for a, b in zip(module.parameters(), plain.parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize("kind", ["dropout", "cnn"])
@pytest.mark.parametrize(
    ("callback", "step", "atol"),
    [
        (lambda: SharpnessAwareMinimization(rho=0.5, variant="asam"), lambda: asam(), 0.0),
        (lambda: SharpnessAwareMinimization(interval=2), lambda: every(2, sam()), 0.0),
        (lambda: SharpnessAwareMinimization(variant="gsam", alpha=0.3), lambda: gsam(), 2e-6),
        (lambda: SharpnessAwareMinimization(variant="looksam", interval=2), lambda: looksam(), 2e-6),
        (
            lambda: SharpnessAwareMinimization(variant="looksam", alpha=0.3),
            lambda: looksam(alpha=0.3, interval=5),
            2e-6,
        ),
    ],
    ids=["asam", "every second step", "gsam", "looksam", "looksam defaults"],
)
def test_variants_equal_the_loop_by_hand(
    callback: Callable[[], SharpnessAwareMinimization], step: Callable[[], Step], atol: float, kind: str
) -> None:
    module, expected = Module(make_net(kind)), make_net(kind)
    fit(module, callback())
    loop_by_hand(expected, step())
    assert_equal_states(module.net, expected, atol)


def test_adamw_with_a_schedule_per_step() -> None:
    module, expected = Module(make_net("cnn"), "adamw", lr=0.1), make_net("cnn")
    fit(module, SharpnessAwareMinimization(rho=0.5, variant="asam"), accumulate=2)
    loop_by_hand(expected, asam(), optimizer="adamw", accumulate=2)
    assert_equal_states(module.net, expected)


def test_bf16_mixed() -> None:
    module, expected = Module(make_net("cnn")), make_net("cnn")
    fit(module, SharpnessAwareMinimization(), precision="bf16-mixed")
    loop_by_hand(expected, sam(), dtype=torch.bfloat16)
    assert_equal_states(module.net, expected)


@pytest.mark.parametrize(("exponent", "accumulate"), [(10, 1), (10, 2), (18, 1), (19, 2)])
def test_fp16_with_a_scaler(exponent: int, accumulate: int) -> None:
    """With the large scales the first step overflows and is skipped; with 2^10 none is."""
    module, expected = Module(make_net("dropout")), make_net("dropout")
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    fit(module, SharpnessAwareMinimization(), scaler=scaler, clip=1.0, accumulate=accumulate)
    loop_by_hand(
        expected, sam(skip_infinite=True), accumulate=accumulate, clip=1.0, dtype=torch.float16, scaler=by_hand
    )
    assert_equal_states(module.net, expected)
    assert scaler.get_scale() == by_hand.get_scale()
    assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)
    assert not all(
        torch.equal(a, b) for a, b in zip(expected.parameters(), make_net("dropout").parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Skipped; second attempt, for there is no direction yet; direction lent; due again; lent; lent.
        ({"variant": "looksam", "interval": 3}, [False, False, True, False, False, True, False, False]),
        # The other processes may have a finite gradient and wait for this one in the second pass.
        ({"sync_perturbation": False}, [False, True] * 6),
    ],
    ids=["looksam", "local perturbation"],
)
def test_overflow_of_the_first_pass(arguments: dict[str, str | int | bool], expected: list[bool]) -> None:
    passes: list[bool] = []

    class Watched(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            passes.append(callback.second_pass)
            # The gradient of the first batch is infinite in float16 with the first scale only.
            return (1e6 if batch_idx == 0 else 1.0) * cast(Tensor, super().training_step(batch, batch_idx))

    callback = SharpnessAwareMinimization(**arguments)  # type: ignore[arg-type]
    module = Watched(make_net("mlp"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(module, callback, scaler=scaler)
    assert passes == expected
    assert scaler.get_scale() == 512
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_overflow_of_the_second_pass_leaves_no_direction_behind() -> None:
    passes: list[bool] = []

    class Watched(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            passes.append(callback.second_pass)
            factor = 1e6 if batch_idx == 0 and callback.second_pass else 1.0
            return factor * cast(Tensor, super().training_step(batch, batch_idx))

    callback = SharpnessAwareMinimization(variant="looksam", interval=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(Watched(make_net("mlp")), callback, scaler=scaler)
    assert passes == [False, True, False, True, False, False, True, False, False]
    assert scaler.get_scale() == 512


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_gradient_does_not_count() -> None:
    passes: list[bool] = []

    class Watched(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            passes.append(callback.second_pass)
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    callback = SharpnessAwareMinimization(variant="looksam", interval=2)
    fit(Watched(make_net("mlp")), callback)
    assert passes == [False, True, False, False, False, True, False, False, True]


def test_rho_may_be_changed_between_steps() -> None:
    class Schedule(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
        ) -> None:
            callback.rho = 0.05 if batch_idx == 0 else 0.0

    callback = SharpnessAwareMinimization(rho=0.3, variant="looksam")
    module, expected = Module(make_net("cnn")), make_net("cnn")
    fit(module, callback, Schedule())
    loop_by_hand(expected, every(6, sam()))
    assert_equal_states(module.net, expected)


@pytest.mark.parametrize("variant", ["sam", "asam", "gsam", "looksam"])
def test_rho_zero_is_the_plain_run(variant: Variant) -> None:
    class Counting(Module):
        calls = 0

        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            self.calls += 1
            return super().training_step(batch, batch_idx)

    state = []
    for callbacks in ([SharpnessAwareMinimization(rho=0.0, variant=variant)], []):
        module = Counting(make_net("cnn"))
        fit(module, *callbacks, accumulate=2)
        state.append((module, torch.get_rng_state()))
    assert_equal_states(state[0][0], state[1][0])
    assert torch.equal(state[0][1], state[1][1])
    assert state[0][0].calls == 6


def test_penalty_of_another_callback_is_counted_in_both_passes() -> None:
    class Penalty(Callback):
        """Add the gradient of 0.1 |w|^2 as a closed form, as elastic weight consolidation does."""

        passes: list[bool] = []  # noqa: RUF012

        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.passes.append(callback.second_pass)
            for parameter in pl_module.parameters():
                cast(Tensor, parameter.grad).add_(parameter.detach(), alpha=0.2 / trainer.accumulate_grad_batches)

    callback = SharpnessAwareMinimization()
    module, expected = Module(make_net("cnn")), make_net("cnn")
    fit(module, callback, Penalty(), accumulate=2)
    loop_by_hand(
        expected,
        sam(),
        accumulate=2,
        penalty=lambda net: 0.1 * nn.utils.parameters_to_vector(net.parameters()).square().sum(),
    )
    assert Penalty.passes == [False, False, True, True] * 3
    assert_equal_states(module.net, expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_may_return_a_dict_or_none() -> None:
    """A batch without a loss is not replayed and adds nothing."""

    class Choosy(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            calls.append(batch_idx)
            return None if batch_idx in (1, 2) else {"loss": super().training_step(batch, batch_idx), "extra": 1}

    calls: list[int] = []
    module, expected = Choosy(make_net("dropout")), make_net("dropout")
    fit(module, SharpnessAwareMinimization(), accumulate=2)
    assert calls == [0, 1, 0, 2, 3, 3, 4, 5, 4, 5]

    optimizer = make_optimizer(expected)
    for window in ([0], [3], [4, 5]):

        def compute(window: list[int] = window) -> None:
            optimizer.zero_grad()
            for index in window:
                torch.manual_seed(100 + index)
                images, labels = make_batches()[index]
                torch.autograd.backward(F.cross_entropy(expected(images), labels) / 2)

        compute()
        sam()(list(expected.parameters()), compute)
        optimizer.step()
    assert_equal_states(module.net, expected)


def test_no_loss_in_the_second_pass_is_a_plain_step() -> None:
    class Fragile(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return None if callback.second_pass and batch_idx % 2 else super().training_step(batch, batch_idx)

    callback = SharpnessAwareMinimization()
    module, plain = Fragile(make_net("cnn")), Module(make_net("cnn"))
    fit(module, callback, accumulate=2)
    fit(plain, accumulate=2)
    assert_equal_states(module, plain)


def test_parameters_without_a_gradient() -> None:
    """One never has a gradient, one has none in the second pass: both stay exactly where they are."""

    class Branches(Module):
        def __init__(self) -> None:
            super().__init__(make_net("mlp"))
            self.never = nn.Parameter(torch.ones(3))
            self.first_pass_only = nn.Parameter(torch.ones(3))

        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            logits = self.net(batch[0])
            if not callback.second_pass:
                logits = logits + self.first_pass_only
            return F.cross_entropy(logits, batch[1])

        def configure_optimizers(self) -> OptimizerLRScheduler:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    callback = SharpnessAwareMinimization(rho=1.0)
    module = Branches()
    fit(module, callback)
    assert torch.equal(module.never, torch.ones(3))
    assert torch.equal(module.first_pass_only, torch.ones(3))
    assert module.never.grad is None


@pytest.mark.parametrize("variant", ["sam", "looksam"])
def test_a_batch_that_does_not_reach_the_optimizers_parameters(variant: Variant) -> None:
    """Odd batches train nothing that the optimizer knows; a plain run does not mind either."""

    class Detour(Module):
        def __init__(self) -> None:
            super().__init__(make_net("mlp"))
            self.other = nn.Parameter(torch.ones(3))

        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return self.other.sum() if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = Detour()
    fit(module, SharpnessAwareMinimization(variant=variant, interval=3))
    assert not torch.equal(next(module.net.parameters()), next(make_net("mlp").parameters()))
    assert torch.equal(module.other, torch.ones(3))


@pytest.mark.parametrize("variant", ["gsam", "looksam"])
def test_a_gradient_missing_in_the_second_pass_counts_as_zero(variant: Variant) -> None:
    class Branch(Module):
        def __init__(self, omit: bool) -> None:
            super().__init__(make_net("mlp"))
            self.bias, self.omit = nn.Parameter(torch.ones(3)), omit

        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            logits = self.net(batch[0])
            if not callback.second_pass:
                logits = logits + self.bias
            elif not self.omit:
                logits = logits + 0 * self.bias
            return F.cross_entropy(logits, batch[1])

        def configure_optimizers(self) -> OptimizerLRScheduler:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    modules = []
    for omit in (False, True):
        callback = SharpnessAwareMinimization(variant=variant, interval=2 if variant == "looksam" else 1)
        modules.append(Branch(omit))
        fit(modules[-1], callback)
    assert_equal_states(modules[0], modules[1], atol=1e-7)


def test_optimizer_step_of_the_user_that_drops_batches() -> None:
    """A batch whose gradient was computed but never used must not be replayed later."""

    class EverySecond(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def optimizer_step(
            self,
            epoch: int,
            batch_idx: int,
            optimizer: torch.optim.Optimizer | LightningOptimizer,
            optimizer_closure: Callable[[], float] | None = None,
        ) -> None:
            assert optimizer_closure is not None
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    calls: list[int] = []
    fit(EverySecond(make_net("mlp")), SharpnessAwareMinimization())
    assert calls == [0, 1, 1, 2, 3, 3, 4, 5, 5]


def test_compiled_net() -> None:
    module, expected = Module(make_net("cnn")), make_net("cnn")
    module.net.compile(backend="eager")
    fit(module, SharpnessAwareMinimization())
    loop_by_hand(expected, sam())
    assert_equal_states(module.net, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_module() -> None:
    """Lightning compiles ``training_step`` itself then, logging included."""

    class Logging(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            loss = cast(Tensor, super().training_step(batch, 0))
            self.log("loss", loss)
            return loss

    module, expected = Logging(make_net("cnn")), make_net("cnn")
    fit(cast(LightningModule, torch.compile(module, backend="eager")), SharpnessAwareMinimization())
    loop_by_hand(expected, sam())
    assert_equal_states(module.net, expected)
    assert module.trainer.callback_metrics.keys() == {"loss"}


def test_second_pass_leaves_the_module_and_the_trainer_as_they_were() -> None:
    module, callback = Module(make_net("cnn")), SharpnessAwareMinimization()
    plain = Module(make_net("cnn"))
    fit(plain)
    trainer = fit(module, callback)
    assert vars(module).keys() == vars(plain).keys()
    assert "training_step" not in vars(trainer.strategy)
    assert "optimizer_step" not in vars(trainer.strategy)
    assert not callback.second_pass
    assert trainer.fit_loop.state_dict() == plain.trainer.fit_loop.state_dict()


@pytest.fixture
def _signals() -> Iterator[None]:
    """Lightning ignores SIGINT for good after an interrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(("error", "raised"), [(RuntimeError("boom"), RuntimeError), (KeyboardInterrupt(), SystemExit)])
def test_exception_in_the_second_pass(error: BaseException, raised: type[BaseException]) -> None:
    class Failing(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2 and callback.second_pass:
                assert not torch.equal(next(self.parameters()), next(expected.parameters()))
                raise error
            if batch_idx == 2:
                expected.load_state_dict(self.net.state_dict())
            return loss

    class FirstWitness(Callback):
        """Saves on an exception, before SAM's own hook runs."""

        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            assert_equal_states(cast(Module, pl_module).net, expected)
            assert type(exception) is type(error)
            seen.append(exception)

    seen: list[BaseException] = []
    callback = SharpnessAwareMinimization(rho=1.0)
    module, expected = Failing(make_net("cnn")), make_net("cnn")
    trainer = make_trainer(FirstWitness(), callback)
    with pytest.raises(raised):
        trainer.fit(module, make_loader())
    assert_equal_states(module.net, expected)
    assert seen == [error]
    assert not callback.second_pass
    assert "log" not in vars(module)
    assert vars(trainer.strategy).keys().isdisjoint({"training_step", "optimizer_step"})


def test_weights_are_restored_by_on_exception_if_the_first_restoration_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = [True]

    def cut_once(targets: list[Tensor], sources: list[Tensor]) -> None:
        if targets and cuts:
            cuts.clear()
            raise RuntimeError("cut")
        overwrite(targets, sources)

    monkeypatch.setattr(f"{SharpnessAwareMinimization.__module__}.overwrite", cut_once)
    module = Module(make_net("mlp"))
    with pytest.raises(RuntimeError, match="cut"):
        fit(module, SharpnessAwareMinimization(rho=1.0))
    assert_equal_states(module.net, make_net("mlp"))


@pytest.mark.parametrize(("variant", "interval"), [("looksam", 4), ("sam", 4)])
def test_train_two_epochs_is_train_one_and_resume_one(tmp_path: Path, variant: Variant, interval: int) -> None:
    """Six batches per epoch: the second epoch starts between two full steps."""

    def run(epochs: int, checkpoint: Path | None = None) -> Module:
        module = Module(make_net("cnn"))
        trainer = make_trainer(SharpnessAwareMinimization(variant=variant, interval=interval), epochs=epochs)
        trainer.fit(module, make_loader(), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    run(1)
    assert_equal_states(run(2, tmp_path / "1.ckpt"), run(2))


def test_a_second_fit_starts_afresh() -> None:
    callback = SharpnessAwareMinimization(variant="looksam", interval=4)
    first, second = Module(make_net("cnn")), Module(make_net("cnn"))
    fit(first, callback)
    fit(Module(make_net("mlp")), callback)
    fit(second, callback)
    assert_equal_states(first, second)


def test_state_key_tells_the_variants_apart() -> None:
    assert SharpnessAwareMinimization().state_key != SharpnessAwareMinimization(variant="looksam").state_key


def test_second_pass_is_read_only() -> None:
    with pytest.raises(AttributeError):
        SharpnessAwareMinimization().second_pass = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, "Expected argument `rho` to be a non-negative float, but got -0.1."),
        ({"rho": float("nan")}, "Expected argument `rho` to be a non-negative float, but got nan."),
        ({"eta": -1.0}, "Expected argument `eta` to be a non-negative float, but got -1.0."),
        ({"alpha": -1.0}, "Expected argument `alpha` to be a non-negative float, but got -1.0."),
        ({"interval": 0}, "Expected argument `interval` to be a positive integer, but got 0."),
        ({"interval": 1.5}, "Expected argument `interval` to be a positive integer, but got 1.5."),
        ({"variant": "sgd"}, "Expected argument `variant` to be one of .*, but got 'sgd'."),
        ({"variant": "gsam", "sync_perturbation": False}, "`sync_perturbation` to be True with variant 'gsam'"),
    ],
)
def test_invalid_arguments(arguments: dict[str, float | str | bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessAwareMinimization(**arguments)  # type: ignore[arg-type]
