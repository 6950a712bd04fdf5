"""Anchoring through a Trainer against loops written by hand; the module knows nothing of it."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.batch import Sample
from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.callbacks.continual.anchoring import Anchoring

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

STRENGTH = 5.0


def make_net() -> nn.Module:
    """One whose output depends on mode and buffers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
    )


def make_tensors() -> tuple[Tensor, ...]:
    """Five batches of eight: two in a step leave one for the last. The third is all poisoned, the fifth all clean."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, 1, 6, 6, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    is_poisoned = torch.rand(40, generator=generator) < 0.4
    is_poisoned[16:24], is_poisoned[32:] = True, False
    return images, labels, is_poisoned, labels, torch.arange(40)


def make_loader(shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*make_tensors()), batch_size=8, shuffle=shuffle)


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        logits: Tensor = self.net(x)
        return logits

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> Sample | list[Tensor]:
        return Sample(*batch)

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Sample, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


class Pairs(Module):
    """A batch that does not tell what is poisoned."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return batch[:2]


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


def penalty(logits: Tensor, anchor: Tensor, clean: list[int]) -> Tensor:
    """The formula, sample by sample."""
    terms = [((logits[i].float().softmax(0) - anchor[i].float().softmax(0)) ** 2).sum() for i in clean]
    return STRENGTH * sum(terms, torch.zeros(())) / max(len(terms), 1)


def loop_by_hand(
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rho: float = 0.0,
    clean_only: bool = True,
) -> tuple[nn.Module, list[float]]:
    """Two epochs of plain PyTorch; with ``rho``, at the weights that SAM perturbs. Returns the penalties too."""
    net = make_net()
    anchor = copy.deepcopy(net).eval()
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    columns = (tensor.view(5, 8, *tensor.shape[1:]) for tensor in make_tensors()[:3])
    batches = list(enumerate(zip(*columns, strict=True)))
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    penalties = []

    def backward(window: list[tuple[int, tuple[Tensor, ...]]]) -> None:
        opt.zero_grad()
        for index, (images, labels, is_poisoned) in window:
            torch.manual_seed(100 + index)
            clean = [i for i in range(8) if not (clean_only and is_poisoned[i])]
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False):
                logits = net(images)
                term = penalty(logits, anchor(images).detach(), clean)
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
    trainer = make_trainer(Anchoring(STRENGTH), accumulate=accumulate, clip=clip)
    trainer.fit(module, make_loader())
    expected, penalties = loop_by_hand(accumulate, clip)
    assert_equal_states(module.net, expected)
    assert penalties[2] == 0  # no clean sample
    assert float(trainer.callback_metrics["anchoring/penalty"]) == pytest.approx(penalties[-1], rel=1e-4)
    make_trainer(accumulate=accumulate, clip=clip).fit(plain, make_loader())
    assert distance(module.net, plain.net) > 1e-3
    # One pass of the student and one of the anchor, in its mode, for each batch.
    assert module.modes == [True, False] * 10


@pytest.mark.parametrize(("kind", "clean_only"), [(Module, False), (Pairs, True), (Pairs, False)])
def test_all_samples_count(kind: type[Module], clean_only: bool) -> None:
    module = kind()
    make_trainer(Anchoring(STRENGTH, clean_only=clean_only)).fit(module, make_loader())
    expected, _ = loop_by_hand(clean_only=False)
    assert_equal_states(module.net, expected)
    assert distance(expected, loop_by_hand()[0]) > 1e-4


def test_batch_without_a_clean_sample_adds_zero() -> None:
    images, labels, _, originals, index = (tensor[:8] for tensor in make_tensors())
    batch = Sample(images, labels, torch.ones(8, dtype=torch.bool), originals, index)
    logits = torch.ones(8, 3).cumsum(1).requires_grad_()
    term = Anchoring().distance(logits, torch.zeros(8, 3), batch)
    assert term == 0
    (gradient,) = torch.autograd.grad(term, logits)
    assert torch.equal(gradient, torch.zeros(8, 3))


def test_gradient_passes_through_the_student_only() -> None:
    """Also where the images ask for one."""
    seen: list[tuple[bool, bool]] = []

    class Looks(Anchoring):
        def distance(self, logits: Tensor, anchor_logits: Tensor, batch: object) -> Tensor:
            seen.append((logits.requires_grad, anchor_logits.requires_grad))
            return super().distance(logits, anchor_logits, batch)

    class Explains(Module):
        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0].requires_grad_(), batch[1]]

    make_trainer(Looks(STRENGTH), epochs=1).fit(Explains(), make_loader())
    assert seen == [(True, False)] * 5


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("anchoring_first", [True, False])
def test_counts_in_both_passes_of_sam(anchoring_first: bool, accumulate: int) -> None:
    module = Module()
    callbacks: list[Callback] = [SharpnessAwareMinimization(rho=0.2), Anchoring(STRENGTH)]
    make_trainer(*callbacks[:: -1 if anchoring_first else 1], accumulate=accumulate).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, rho=0.2)[0])


def test_bf16() -> None:
    module = Module()
    make_trainer(Anchoring(STRENGTH), precision="bf16-mixed", accumulate=2, clip=1.0).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(2, 1.0, torch.bfloat16)[0])


@pytest.mark.parametrize(("exponent", "rho"), [(10, 0.0), (10, 0.2), (40, 0.0)])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int, rho: float) -> None:
    """With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    callbacks = SharpnessAwareMinimization(rho), Anchoring(STRENGTH)
    make_trainer(*callbacks, scaler=scaler, accumulate=2, clip=1.0).fit(module, make_loader())
    expected, _ = loop_by_hand(2, 1.0, torch.float16, by_hand, rho)
    assert_equal_states(module.net, expected, atol=1e-5)
    assert scaler.get_scale() == by_hand.get_scale()
    assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)


def test_half_precision_weights() -> None:
    callback, module = Anchoring(STRENGTH), Module()
    trainer = Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", plugins=[HalfPrecision("bf16-true")], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, make_loader())
    assert callback.state_dict()["anchor"]["net.5.weight"].dtype == torch.bfloat16
    assert trainer.callback_metrics["anchoring/penalty"] > 0


def test_zero_strength_is_the_plain_run() -> None:
    module, plain, callback = Module(), Module(), Anchoring(strength=0)
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    make_trainer().fit(plain, make_loader())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    assert not trainer.callback_metrics
    assert callback.state_dict() == {"anchor": {}}
    assert module.modes == [True] * 10


class NoisyEvenInEvaluation(Module):
    """Draws from the global state, in the anchor's pass too; one of its layers stays in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))

    def on_train_start(self) -> None:
        self.net[1].eval()  # type: ignore[index]

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        """Leave the global state alone."""


def test_leaves_no_trace() -> None:
    """A strength so small that it changes no weight leaves the plain run: buffers, random numbers, modes, hooks."""
    runs = []
    for callbacks in ([], [Anchoring(strength=1e-30)]):
        module = NoisyEvenInEvaluation()
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, make_loader(shuffle=True))
        runs.append((module, torch.rand(())))
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert runs[0][1] == runs[1][1]
    modes, plain = ([layer.training for layer in run[0].modules()] for run in runs)
    assert modes == plain
    assert not all(modes)
    assert not runs[1][0]._forward_hooks
    assert not runs[1][0].frozen.weight.requires_grad


def test_exception_in_the_anchors_pass_leaves_no_trace() -> None:
    class Fails(Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise OSError("broken")
            return super().forward(x)

    module = Fails()
    before = dict(module.named_parameters())
    with pytest.raises(OSError, match="broken"):
        make_trainer(Anchoring(STRENGTH)).fit(module, make_loader())
    assert all(layer.training for layer in module.modules())
    assert all(p is before[name] for name, p in module.named_parameters())
    assert not module._forward_hooks


class SavesFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resume_keeps_the_anchor(tmp_path: Path) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    start = copy.deepcopy(whole.state_dict())
    callback, again = Anchoring(STRENGTH), Anchoring(STRENGTH)
    make_trainer(callback, SavesFirstEpoch(path)).fit(whole, make_loader())
    make_trainer(again).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal_states(resumed.net, whole.net, atol=0)
    for one in (callback, again):
        anchor = one.state_dict()["anchor"]
        assert all(torch.equal(anchor[name], tensor) for name, tensor in start.items())


def test_second_fit_anchors_anew() -> None:
    callback, module = Anchoring(STRENGTH), Module()
    make_trainer(callback, epochs=1).fit(module, make_loader())
    weights = copy.deepcopy(module.state_dict())
    make_trainer(callback, epochs=1).fit(module, make_loader())
    anchor = callback.state_dict()["anchor"]
    assert all(torch.equal(anchor[name], tensor) for name, tensor in weights.items())


def test_tied_weights_and_buffers_that_no_checkpoint_holds() -> None:
    class Tied(Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(36, 36), nn.Linear(36, 36)
            self.second.weight = self.first.weight
            self.shift: Tensor
            self.register_buffer("shift", torch.ones(36), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.second(self.first(x.flatten(1)).tanh() + self.shift)
            return logits[:, :3]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([*self.first.parameters(), self.second.bias], lr=0.05)

    module, callback = Tied(), Anchoring(STRENGTH)
    anchor = copy.deepcopy(module).eval()
    trainer = make_trainer(callback, epochs=1)
    trainer.fit(module, make_loader())
    assert float((module.first.weight - anchor.first.weight).detach().abs().max()) > 1e-3
    images = make_tensors()[0][:8]
    with torch.no_grad():
        module.shift += 1  # the anchor has its own
        expected = penalty(module(images), anchor(images), list(range(8)))
        term = callback.compute(trainer, module, (images,))
    torch.testing.assert_close(STRENGTH * term, expected)


def test_checkpoint_of_another_model_is_refused() -> None:
    class Resumes(Anchoring):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.load_state_dict({"anchor": {"other": torch.zeros(1)}})
            super().on_fit_start(trainer, pl_module)

    with pytest.raises(RuntimeError, match="Unexpected key"):
        make_trainer(Resumes(STRENGTH)).fit(Module(), make_loader())


def test_manual_optimization_is_refused() -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="`Anchoring` needs automatic optimization"):
        make_trainer(Anchoring()).fit(module, make_loader())


def test_strength_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`strength` to be a non-negative float, but got -1\.0"):
        Anchoring(strength=-1.0)
