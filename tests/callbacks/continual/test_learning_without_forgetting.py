"""Learning without forgetting through a Trainer against loops written by hand."""

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.callbacks.continual.anchoring import Anchoring
from lightning_bd.callbacks.continual.learning_without_forgetting import LearningWithoutForgetting

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
STRENGTH, TEMPERATURE = 2.0, 3.0


def make_net() -> nn.Module:
    """One whose output depends on mode and buffers, and that is far from certain of its classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 4))


def make_batches() -> list[Batch]:
    """Five batches of eight: with two in a step, the last step has one."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 8, 6, generator=generator)
    return list(zip(images, torch.randint(4, (5, 8), generator=generator), strict=True))


def make_loader(shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8, shuffle=shuffle)


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


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


def penalty(logits: Tensor, teacher: Tensor) -> Tensor:
    """The paper's cross-entropy of the softened probabilities, less the teacher's entropy, times the factor."""
    targets = (teacher.float() / TEMPERATURE).softmax(1)
    cross_entropy = F.cross_entropy(logits.float() / TEMPERATURE, targets)
    entropy = -(targets * targets.log()).sum(1).mean()
    return STRENGTH * TEMPERATURE**2 * (cross_entropy - entropy)


def loop_by_hand(
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rho: float = 0.0,
) -> tuple[nn.Module, list[float]]:
    """Two epochs of plain PyTorch; with ``rho``, at the weights that SAM perturbs. Returns the penalties too."""
    net = make_net()
    teacher = copy.deepcopy(net).eval()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches = list(enumerate(make_batches()))
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    penalties = []

    def backward(window: list[tuple[int, Batch]]) -> None:
        opt.zero_grad()
        for index, (images, labels) in window:
            torch.manual_seed(100 + index)
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False):
                logits = net(images)
                term = penalty(logits, teacher(images).detach())
                loss = F.cross_entropy(logits, labels) + term
            penalties.append(float(term.detach()))
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
    return net, penalties


def make_callback() -> LearningWithoutForgetting:
    return LearningWithoutForgetting(STRENGTH, TEMPERATURE)


def assert_equal_states(actual: nn.Module, expected: nn.Module, atol: float = 1e-6) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_formula_in_the_loss(accumulate: int, clip: float | None) -> None:
    module, plain = Module(), Module()
    trainer = make_trainer(make_callback(), accumulate=accumulate, clip=clip)
    trainer.fit(module, make_loader())
    expected, penalties = loop_by_hand(accumulate, clip)
    assert_equal_states(module.net, expected)
    assert float(trainer.callback_metrics["lwf/penalty"]) == pytest.approx(penalties[-1], rel=1e-4)
    make_trainer(accumulate=accumulate, clip=clip).fit(plain, make_loader())
    assert distance(module.net, plain.net) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sam_first", [True, False])
def test_counts_in_both_passes_of_sam(sam_first: bool, accumulate: int) -> None:
    module = Module()
    callbacks: list[Callback] = [SharpnessAwareMinimization(rho=0.2), make_callback()]
    make_trainer(*callbacks[:: 1 if sam_first else -1], accumulate=accumulate).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, rho=0.2)[0])


def test_bf16() -> None:
    module = Module()
    make_trainer(make_callback(), precision="bf16-mixed", accumulate=2, clip=1.0).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(2, 1.0, torch.bfloat16)[0])


@pytest.mark.parametrize(("exponent", "rho"), [(10, 0.0), (10, 0.2), (40, 0.0)])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int, rho: float) -> None:
    """With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    callbacks = SharpnessAwareMinimization(rho), make_callback()
    make_trainer(*callbacks, scaler=scaler, accumulate=2, clip=1.0).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(2, 1.0, torch.float16, by_hand, rho)[0], atol=1e-5)
    assert scaler.get_scale() == by_hand.get_scale()
    assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)


def test_beside_another_term() -> None:
    """Each takes the logits of the same step and its own anchor."""
    module, other = Module(), Module()
    callbacks = [LearningWithoutForgetting(STRENGTH, TEMPERATURE), Anchoring(strength=1e-30)]
    make_trainer(*callbacks).fit(module, make_loader())
    make_trainer(*callbacks[::-1]).fit(other, make_loader())
    assert_equal_states(module.net, loop_by_hand()[0])
    assert_equal_states(module.net, other.net, atol=0)


def test_zero_strength_is_the_plain_run() -> None:
    module, plain, callback = Module(), Module(), LearningWithoutForgetting(strength=0)
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    make_trainer().fit(plain, make_loader())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    assert not trainer.callback_metrics
    assert callback.state_dict() == {"anchor": {}}


def test_leaves_no_trace() -> None:
    """A strength so small that it changes no weight leaves the plain run, random numbers included."""

    class Unseeded(Module):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            """Draw the masks from the global state."""

    runs = []
    for callbacks in ([], [LearningWithoutForgetting(strength=1e-30)]):
        module = Unseeded()
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, make_loader(shuffle=True))
        runs.append((module, torch.rand(())))
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert runs[0][1] == runs[1][1]
    assert all(layer.training for layer in runs[1][0].modules())
    assert not runs[1][0]._forward_hooks


class SavesFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resume_keeps_the_old_model(tmp_path: Path) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    make_trainer(make_callback(), SavesFirstEpoch(path)).fit(whole, make_loader())
    make_trainer(make_callback()).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal_states(resumed.net, whole.net, atol=0)


def test_manual_optimization_is_refused() -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="`LearningWithoutForgetting` needs automatic optimization"):
        make_trainer(make_callback()).fit(module, make_loader())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"`temperature` to be a positive float, but got {temperature}"):
        LearningWithoutForgetting(temperature=temperature)


def test_strength_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`strength` to be a non-negative float, but got -1\.0"):
        LearningWithoutForgetting(strength=-1.0)
