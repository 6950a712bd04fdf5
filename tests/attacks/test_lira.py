"""LIRA against a loop by hand, in every situation that its trigger's optimizer must follow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.attacks.base import GeneratorAttack
from lightning_bd.attacks.generator_training import GeneratorTraining
from lightning_bd.attacks.lira import LIRA
from lightning_bd.batch import AttackBatch, Sample
from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import PhaseData
from lightning_bd.datamodules.loader import Place
from lightning_bd.triggers import BadNets, LIRATrigger

if TYPE_CHECKING:
    from tests.attacks.conftest import Lab

Same = Callable[[nn.Module, nn.Module], bool]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def model_of(lab: Lab, **others: Any) -> LIRA:
    return LIRA(lab.backbone(), 10, **{"alpha": 0.3, "generator_lr": 0.01, "optimizer": sgd, **others})


def loss_by_hand(
    net: nn.Module, trigger: LIRATrigger, batch: AttackBatch, alpha: float = 0.3, strength: float = 0.3
) -> Tensor:
    """All images in the order of the batch, for BatchNorm; each pixel and each row by a loop over the formula."""
    poisoned = [bool(flag) for flag in batch.is_poisoned]
    noise = torch.tanh(trigger.network(batch.clean_image))
    triggered = (batch.clean_image + strength * noise).clamp(0, 1)
    flags = batch.is_poisoned[:, None, None, None]
    losses = F.cross_entropy(net(torch.where(flags, triggered, batch.clean_image)), batch.label, reduction="none")
    attack = torch.stack([loss for loss, flag in zip(losses, poisoned, strict=True) if flag]).mean()
    clean = torch.stack([loss for loss, flag in zip(losses, poisoned, strict=True) if not flag]).mean()
    return alpha * clean + (1 - alpha) * attack


def train_by_hand(
    net: nn.Module, trigger: LIRATrigger, windows: Sequence[Sequence[AttackBatch]], rho: float = 0.0, **others: float
) -> None:
    net.train()
    trigger.requires_grad_(True)
    optimizers = [sgd(net.parameters()), torch.optim.Adam(trigger.parameters(), lr=0.01)]
    for window in windows:
        net.zero_grad()
        trigger.zero_grad()
        buffers = {}
        for batch in window:
            torch.autograd.backward(loss_by_hand(net, trigger, batch, **others) / len(window))
        if rho:
            buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
            gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            steps = [rho * gradient / norm for gradient in gradients]
            before = [p.detach().clone() for p in net.parameters()]
            with torch.no_grad():
                for p, step in zip(net.parameters(), steps, strict=True):
                    p.add_(step)
            net.zero_grad()
            trigger.zero_grad()
            for batch in window:
                torch.autograd.backward(loss_by_hand(net, trigger, batch, **others) / len(window))
            with torch.no_grad():
                for p, value in zip(net.parameters(), before, strict=True):
                    p.copy_(value)
                for name, buffer in net.named_buffers():
                    buffer.copy_(buffers[name])
        for optimizer in optimizers:
            optimizer.step()
    trigger.requires_grad_(False)


def check_close(one: nn.Module, other: nn.Module, atol: float = 2e-6) -> None:
    state, others = one.state_dict(), other.state_dict()
    for name, tensor in state.items():
        assert torch.allclose(tensor, others[name], atol=atol), name


@pytest.mark.parametrize(
    ("window", "rho", "strength"), [(1, 0.0, None), (1, 0.0, 0.6), (3, 0.0, None), (1, 0.1, None), (3, 0.1, None)]
)
def test_both_follow_the_gradient_of_one_loss(lab: Lab, window: int, rho: float, strength: float | None) -> None:
    recorder, model, data = lab.recorder(), model_of(lab, training_strength=strength), lab.data(lab.lira_trigger())
    data.setup()
    assert data.poison is not None
    net, trigger = copy.deepcopy(model.backbone), copy.deepcopy(data.poison.trigger)
    assert isinstance(trigger, LIRATrigger)
    sam = [SharpnessAwareMinimization(rho=rho)] if rho else []
    lab.trainer(2, recorder, *sam, accumulate_grad_batches=window).fit(model, datamodule=data)
    batches = recorder.batches
    assert len(batches) == 6
    assert all(isinstance(batch, AttackBatch) for batch in batches)
    windows = [batches[start : start + window] for start in range(0, 6, window)]
    train_by_hand(net, trigger, windows, rho, strength=strength or 0.3)
    check_close(model.backbone, net)
    check_close(data.poison.trigger, trigger)
    assert not torch.equal(data.poison.trigger(torch.zeros(1, 1, 8, 8)), lab.lira_trigger()(torch.zeros(1, 1, 8, 8)))


def test_the_batch_is_a_finished_one_and_has_its_clean_images(lab: Lab) -> None:
    recorder, data = lab.recorder(), lab.data(lab.lira_trigger(), augment="crop_flip")
    lab.trainer(1, recorder).fit(model_of(lab, generator_epochs=0), datamodule=data)
    assert data.poison is not None
    loader = data.train_dataloader()
    loader.place = Place  # the first epoch's, again
    for raw, batch in zip(loader, recorder.batches, strict=True):
        finished = data.on_after_batch_transfer(raw, 0)
        assert isinstance(finished, Sample)
        assert all(torch.equal(one, other) for one, other in zip(finished, batch, strict=False))
        assert not batch.image.requires_grad
        rows = batch.is_poisoned
        assert torch.equal(batch.poison_rows, rows.nonzero().flatten())
        assert torch.equal(batch.image[~rows], batch.clean_image[~rows])
        assert torch.allclose(batch.image[rows], data.poison.trigger(batch.clean_image[rows]), atol=1e-6)
        assert (batch.label[rows] == 0).all()


def test_in_the_second_stage_the_trigger_stays(lab: Lab, same: Same) -> None:
    finals = {}
    for epochs in (1, 3):
        model, data = model_of(lab, generator_epochs=1), lab.data(lab.lira_trigger())
        lab.trainer(epochs).fit(model, datamodule=data)
        assert data.poison is not None
        finals[epochs] = (model.backbone, data.poison.trigger)
    assert same(finals[1][1], finals[3][1])
    assert not same(finals[1][0], finals[3][0])


def test_a_batch_without_triggered_images_leaves_the_trigger(lab: Lab, same: Same) -> None:
    model, data = model_of(lab), lab.data(lab.lira_trigger(), rate=0.02, batch_size=4)
    weights: list[dict[str, Tensor]] = []

    class Watch(lab.recorder):  # type: ignore[name-defined, misc]
        def on_train_batch_start(self, *arguments: Any) -> None:
            super().on_train_batch_start(*arguments)
            assert data.poison is not None
            weights.append({name: tensor.clone() for name, tensor in data.poison.trigger.state_dict().items()})

    recorder = Watch()
    lab.trainer(1, recorder).fit(model, datamodule=data)
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(weights)]
    assert moved == [bool(batch.is_poisoned.any()) for batch in recorder.batches[:-1]]
    assert 0 < sum(moved) < len(moved)


def test_all_images_may_be_triggered(lab: Lab) -> None:
    lab.trainer(1).fit(model_of(lab), datamodule=lab.data(lab.lira_trigger(), rate=1.0))


def test_a_clean_phase_is_that_of_a_plain_classifier(lab: Lab, same: Same) -> None:
    finals = []
    for model in (model_of(lab), BackdoorClassifier(lab.backbone(), 10, optimizer=sgd)):
        data = lab.data(lab.lira_trigger())
        data.set_phase(PhaseData("clean"))
        trainer = lab.trainer(2)
        trainer.fit(model, datamodule=data)
        assert not any(isinstance(callback, GeneratorTraining) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        assert data.poison is not None
        fresh = lab.lira_trigger()
        fresh.build((1, 8, 8))
        assert same(data.poison.trigger, fresh)
        finals.append(model)
    assert same(*finals)


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left(lab: Lab, fails: bool) -> None:
    model, data = model_of(lab), lab.data(lab.lira_trigger())
    trainer = lab.trainer(1, *([lab.cut(0)] if fails else []))
    if fails:
        with pytest.raises(ConnectionAbortedError, match="cut"):
            trainer.fit(model, datamodule=data)
    else:
        trainer.fit(model, datamodule=data)
    assert data.poison is not None
    for parameter in data.poison.trigger.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert not data.keeps_clean_images
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in BackdoorClassifier(lab.backbone(), 10).named_parameters()}
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert isinstance(batch, Sample)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_fit_ends_as_an_uncut_one(lab: Lab, same: Same, tmp_path: Path) -> None:
    uncut, uncut_data = model_of(lab), lab.data(lab.lira_trigger())
    lab.trainer(3).fit(uncut, datamodule=uncut_data)
    cut, data = model_of(lab), lab.data(lab.lira_trigger())
    first, second = (ModelCheckpoint(tmp_path / name, filename="last") for name in ("first", "second"))
    with pytest.raises(ConnectionAbortedError):
        lab.trainer(3, first, lab.cut(1), enable_checkpointing=True).fit(cut, datamodule=data)
    resumed, data = model_of(lab), lab.data(lab.lira_trigger())
    path = tmp_path / "first" / "last.ckpt"
    lab.trainer(3, second, enable_checkpointing=True).fit(resumed, datamodule=data, ckpt_path=path, weights_only=True)
    assert data.poison is not None
    assert uncut_data.poison is not None
    assert same(resumed, uncut)
    assert same(data.poison.trigger, uncut_data.poison.trigger)
    # A plain Trainer, too, measures with the trigger of the checkpoint.
    data = lab.data(lab.lira_trigger())
    other = model_of(lab)
    path = tmp_path / "second" / "last.ckpt"
    lab.trainer(1, second, enable_checkpointing=True).test(
        other, datamodule=data, ckpt_path=path, weights_only=True, verbose=False
    )
    assert data.poison is not None
    assert same(data.poison.trigger, uncut_data.poison.trigger)


def test_wrong_arguments_are_refused(lab: Lab) -> None:
    for name, value, words in (
        ("alpha", 1.0, r"a float in \[0, 1\), but got 1.0"),
        ("generator_epochs", -1, "a non-negative integer, but got -1"),
        ("training_strength", 0.0, r"a float in \(0, 1\], but got 0.0"),
        ("generator_lr", 0.0, "a positive float, but got 0.0"),
        ("generator_betas", (0.5, 1.0), r"two floats in \[0, 1\), but got \(0.5, 1.0\)"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` to be {words}"):
            model_of(lab, **{name: value})


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_wrong_situations_are_refused(lab: Lab) -> None:
    def refused(trainer: Trainer, words: str, **fit: Any) -> None:
        with pytest.raises(MisconfigurationException, match=words):
            trainer.fit(model_of(lab, **fit.pop("model", {})), **fit)

    refused(lab.trainer(1), "has a `BadNets`. Set `data.poison.trigger`", datamodule=lab.data(BadNets(2)))
    clean = lab.data(lab.lira_trigger())
    clean.poison, clean.phase = None, PhaseData()
    refused(lab.trainer(1), "the data has no poison. Set", datamodule=clean)
    static = lab.data(lab.lira_trigger())
    static.phase = PhaseData(poison="static")
    refused(lab.trainer(1), "`poisoned` to `dynamic`", datamodule=static)
    loader = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4).long()))
    refused(lab.trainer(1), "not only loaders", train_dataloaders=loader)
    refused(lab.trainer(1), "which pairs do not have", datamodule=lab.data(lab.lira_trigger(), batch_format="pair"))
    lbfgs: dict[str, Any] = {"optimizer": torch.optim.LBFGS}
    refused(lab.trainer(1), "LBFGS evaluates several times", datamodule=lab.data(lab.lira_trigger()), model=lbfgs)


def test_a_loss_that_is_scaled_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = lab.trainer(1)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    with pytest.raises(MisconfigurationException, match=r"16-bit mixed precision has not unscaled. Use"):
        trainer.fit(model_of(lab), datamodule=lab.data(lab.lira_trigger()))


def test_bfloat16_trains(lab: Lab) -> None:
    data = lab.data(lab.lira_trigger())
    lab.trainer(1, precision="bf16-mixed").fit(model_of(lab), datamodule=data)
    assert data.poison is not None
    assert all(parameter.dtype is torch.float32 for parameter in data.poison.trigger.parameters())


def test_the_base_says_nothing_of_the_loss() -> None:
    assert GeneratorAttack.attack_loss.__isabstractmethod__  # type: ignore[attr-defined]
