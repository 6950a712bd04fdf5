"""The input-aware attack against a loop by hand: masks first, then patterns with the classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_bd.attacks.input_aware import InputAware, diversity_loss
from lightning_bd.batch import AttackBatch
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.triggers import InputAwareTrigger

if TYPE_CHECKING:
    from tests.attacks.conftest import Lab

Same = Callable[[nn.Module, nn.Module], bool]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def model_of(lab: Lab, **others: Any) -> InputAware:
    return InputAware(lab.backbone(), 10, **{"mask_epochs": 1, "diversity": 0.5, "optimizer": sgd, **others})


def trigger_of(data: DigitsDataModule) -> InputAwareTrigger:
    assert data.poison is not None
    data.setup()
    assert isinstance(data.poison.trigger, InputAwareTrigger)
    return data.poison.trigger


def norms(differences: Tensor) -> Tensor:
    return torch.stack([difference.flatten().norm() / difference.numel() ** 0.5 for difference in differences])


def loss_by_hand(net: nn.Module, trigger: InputAwareTrigger, batch: AttackBatch, weight: float) -> Tensor:
    clean, count = batch.clean_image, len(batch.label)
    covers, images, ratios = set(batch.cover_rows.tolist()), [], []
    for row in range(count):
        image, other = clean[row : row + 1], clean[(row + 1) % count][None]
        if batch.is_poisoned[row]:
            mask, pattern = trigger.mask(image), trigger.pattern(image)
            images.append(image * (1 - mask) + pattern * mask)
            ratios.append(norms(image - other) / (norms(pattern - trigger.pattern(other)) + 1e-7))
        elif row in covers:
            mask, pattern = trigger.mask(other), trigger.pattern(other)
            images.append(image * (1 - mask) + pattern * mask)
        else:
            images.append(image)
    loss = F.cross_entropy(net(torch.cat(images)), batch.label)
    return loss + weight * torch.cat(ratios).mean() if ratios else loss


def check_close(one: nn.Module, other: nn.Module, atol: float) -> None:
    state, others = one.state_dict(), other.state_dict()
    for name, tensor in state.items():
        assert torch.allclose(tensor, others[name], atol=atol), name


def test_diversity_is_a_mean_of_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    images, others = torch.rand(2, 5, 3, 4, 4, generator=generator)
    masks, other_masks = torch.rand(2, 5, 1, 4, 4, generator=generator)
    expected = (norms(images - others) / (norms(masks - other_masks) + 1e-7)).mean()
    assert torch.allclose(diversity_loss(images, others, masks, other_masks), expected)


def test_equal_outputs_have_a_finite_gradient() -> None:
    images, outputs = torch.rand(3, 1, 4, 4), torch.full((3, 1, 4, 4), 0.5, requires_grad=True)
    loss = diversity_loss(images, images, outputs, outputs.roll(1, 0))
    torch.autograd.backward(loss)
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()


def test_pattern_and_classifier_follow_the_loss(lab: Lab, same: Same) -> None:
    recorder, model = lab.recorder(), model_of(lab, mask_epochs=0)
    data = lab.data(lab.input_aware_trigger(), rate=0.3, cover_rate=0.2)
    net, trigger = copy.deepcopy(model.backbone), copy.deepcopy(trigger_of(data))
    lab.trainer(1, recorder).fit(model, datamodule=data)
    assert sum(len(batch.cover_rows) for batch in recorder.batches) > 5
    parameters = trigger.part("pattern").requires_grad_(True).parameters()
    optimizers = [sgd(net.parameters()), torch.optim.Adam(parameters, lr=0.01, betas=(0.5, 0.9))]
    net.train()
    for batch in recorder.batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss_by_hand(net, trigger, batch, 0.5))
        for optimizer in optimizers:
            optimizer.step()
    check_close(model.backbone, net, 1e-5)
    check_close(trigger_of(data), trigger, 1e-4)
    assert same(trigger_of(data).part("mask"), trigger.part("mask"))
    untrained = lab.input_aware_trigger()
    untrained.build((1, 8, 8))
    assert not same(trigger_of(data).part("pattern"), untrained.part("pattern"))


def test_masks_are_trained_first_and_alone(lab: Lab, same: Same) -> None:
    data = lab.data(lab.input_aware_trigger(), augment="crop")
    trigger = copy.deepcopy(trigger_of(data))
    optimizer = torch.optim.Adam(trigger.part("mask").requires_grad_(True).parameters(), lr=0.02, betas=(0.5, 0.9))
    for epoch in range(2):
        for batch in data.clean_batches("masks", epoch):
            optimizer.zero_grad()
            masks = trigger.mask(batch.image)
            others, other_masks = batch.image.roll(-1, 0), masks.roll(-1, 0)
            ratio = (norms(batch.image - others) / (norms(masks - other_masks) + 1e-7)).mean()
            excess = torch.stack([(pixel - 0.1).clamp(min=0) for pixel in masks.flatten()]).mean()
            torch.autograd.backward(30 * excess + 0.5 * ratio)
            optimizer.step()

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            check_close(trigger_of(data).part("mask"), trigger.part("mask"), 1e-4)
            assert not any(p.requires_grad or p.grad is not None for p in trigger_of(data).part("mask").parameters())

    model = model_of(lab, mask_epochs=2, mask_density=0.1, mask_norm=30.0, generator_lr=0.02)
    lab.trainer(1, Look()).fit(model, datamodule=data)
    check_close(trigger_of(data).part("mask"), trigger.part("mask"), 1e-4)
    # The next poisoned phase does not train them again.
    before = copy.deepcopy(trigger_of(data).part("mask"))
    lab.trainer(1).fit(model, datamodule=data)
    assert same(trigger_of(data).part("mask"), before)


def test_clean_batches_are_one_epoch_in_an_order_of_its_own(lab: Lab) -> None:
    data = lab.data(lab.input_aware_trigger())
    data.set_phase(PhaseData("attack", poison="dynamic"))
    first, again, later = (
        torch.cat([batch.index for batch in data.clean_batches("masks", epoch)]) for epoch in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert first.sort().values.tolist() == later.sort().values.tolist() == list(range(96))
    assert not any(batch.is_poisoned.any() for batch in data.clean_batches("masks"))
    assert not torch.equal(first, torch.cat([raw.indices for raw in data.train_dataloader()]))


def test_a_trigger_works_on_its_own_image_in_a_batch(lab: Lab) -> None:
    """A row's trigger is made of that row, a cover's of the next one, also at the end of the batch."""
    trigger = lab.input_aware_trigger()
    data = lab.data(trigger, rate=0.5, cover_rate=0.5)
    recorder, model = lab.recorder(), model_of(lab, mask_epochs=0, diversity=0.0)
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    lab.trainer(1, recorder, limit_train_batches=1).fit(model, datamodule=data)
    (batch,) = recorder.batches
    fresh = lab.input_aware_trigger()
    fresh.build((1, 8, 8))
    own, crossed = (fresh.put(batch.clean_image, batch.clean_image.roll(-shift, 0)) for shift in (0, 1))
    expected = torch.where(batch.is_poisoned[:, None, None, None], own, crossed)
    assert len(batch.poison_rows) + len(batch.cover_rows) > 28
    changed = torch.cat([batch.poison_rows, batch.cover_rows])
    assert torch.allclose(seen[0][changed], expected[changed], atol=1e-5)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_fit_ends_as_an_uncut_one(lab: Lab, same: Same, tmp_path: Path) -> None:
    def data() -> DigitsDataModule:
        return lab.data(lab.input_aware_trigger(), rate=0.3, cover_rate=0.2)

    uncut, uncut_data = model_of(lab), data()
    lab.trainer(3).fit(uncut, datamodule=uncut_data)
    first, second = (ModelCheckpoint(tmp_path / name, filename="last") for name in ("first", "second"))
    with pytest.raises(ConnectionAbortedError):
        lab.trainer(3, first, lab.cut(1), enable_checkpointing=True).fit(model_of(lab), datamodule=data())
    resumed, resumed_data = model_of(lab), data()
    path = tmp_path / "first" / "last.ckpt"
    lab.trainer(3, second, enable_checkpointing=True).fit(
        resumed, datamodule=resumed_data, ckpt_path=path, weights_only=True
    )
    assert same(resumed, uncut)
    assert same(trigger_of(resumed_data), trigger_of(uncut_data))


def test_an_exception_while_masks_are_trained_leaves_no_trace(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise ConnectionAbortedError("cut")

    data = lab.data(lab.input_aware_trigger())
    monkeypatch.setattr(InputAware, "mask_loss", fail)
    with pytest.raises(ConnectionAbortedError):
        lab.trainer(1).fit(model_of(lab), datamodule=data)
    assert not any(parameter.requires_grad for parameter in trigger_of(data).parameters())
    assert not data.keeps_clean_images


def test_wrong_arguments_are_refused(lab: Lab) -> None:
    for name, value, words in (
        ("diversity", -1.0, "a non-negative float, but got -1.0"),
        ("mask_norm", -1.0, "a non-negative float, but got -1.0"),
        ("mask_density", 1.5, r"a share in \[0, 1\], but got 1.5"),
        ("mask_epochs", -1, "a non-negative integer, but got -1"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` to be {words}"):
            model_of(lab, **{name: value})
