"""A plain BadNets model on scikit-learn's digits, its defender's data, and how the attack is measured."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn

from lightning_bd import backbones
from lightning_bd.batch import Sample
from lightning_bd.callbacks.defense.base import DefenderData
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.datamodules.images import ImageSet, TensorImages
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: backbones.small_cnn(10, in_channels=1),
    "resnet20": lambda: backbones.resnet20(10, in_channels=1),
}


class _Digits(DigitsDataModule):
    """The digits at 8x8 or, each pixel repeated, at 16x16."""

    def __init__(self, scale: int, poison: Poison | None = None) -> None:
        super().__init__(poison, {"inject": 0.7, "defend": 0.3}, augment="none", seed=1)
        self.scale = scale

    def load(self, train: bool) -> TensorImages:
        digits = super().load(train)
        images: ImageSet = digits
        pixels = images.read(torch.arange(len(digits)))
        for dim in (2, 3):
            pixels = pixels.repeat_interleave(self.scale, dim)
        return TensorImages(pixels, digits.labels, digits.class_names)


@dataclass
class Attacked:
    """One backdoored model and what a defender has.

    Attributes:
        trained: The model; use :meth:`model` for a copy.
        data: The defender's data.
        datamodule: The attacker's side, to measure with.
    """

    trained: BackdoorClassifier
    data: DefenderData
    datamodule: DigitsDataModule

    def model(self) -> BackdoorClassifier:
        """A copy of the backdoored model that a test may change."""
        return copy.deepcopy(self.trained)

    @torch.no_grad()
    def rates(self, model: nn.Module) -> tuple[float, float]:
        """Clean accuracy and attack success rate of a model on the test set."""
        was_training = model.training
        model.eval()
        found = []
        for loader in self.datamodule.test_dataloader():
            right = total = 0
            for raw in loader:
                batch = self.datamodule.on_after_batch_transfer(raw, 0)
                assert isinstance(batch, Sample)
                right += int((model(batch.image).argmax(1) == batch.label).sum())
                total += len(batch.label)
            found.append(right / total)
        model.train(was_training)
        return found[0], found[1]

    def check_removed(self, model: nn.Module) -> tuple[float, float]:
        """Fail unless ASR fell by 20 points or more and clean accuracy by 3 points or less; return the new rates."""
        accuracy, success = self.rates(self.trained)
        after_accuracy, after_success = self.rates(model)
        assert success >= 0.9
        assert after_success <= success - 0.2, f"ASR {success:.3f} -> {after_success:.3f}"
        assert after_accuracy >= accuracy - 0.03, f"clean accuracy {accuracy:.3f} -> {after_accuracy:.3f}"
        return after_accuracy, after_success


@cache
def attack(name: str, scale: int, epochs: int) -> Attacked:
    """Train BadNets with 10 % poison, conventionally, and cut the defender's view from the other split."""
    datamodule = _Digits(scale, Poison(BadNets(size=2 * scale, pattern="white"), 0.1, 0, "static"))
    datamodule.setup()
    inject = PhaseData("inject", ("inject",), "static", 64)
    datamodule.set_phase(inject)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BackdoorClassifier(BUILDERS[name](), num_classes=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        loader = datamodule.train_dataloader()
        for epoch in range(epochs):
            place = type(loader.place())(epoch)
            loader.place = lambda place=place: place
            for raw in loader:
                images, labels = datamodule.on_after_batch_transfer(raw, 0)[:2]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    model.eval()
    view = datamodule.defender_view(PhaseData("defend", ("defend",), None, 32))
    data = DefenderData(
        lambda epoch: view.batches("train", epoch=epoch), lambda: view.batches("validation"), view.num_classes
    )
    return Attacked(model, data, datamodule)


@pytest.fixture(scope="session")
def attacked_small_cnn() -> Attacked:
    """A small_cnn on 8x8 digits with BadNets; trained once per session."""
    return attack("small_cnn", 1, 30)


@pytest.fixture(scope="session")
def attacked_resnet() -> Attacked:
    """A resnet20 on 16x16 digits with BadNets; trained once per session."""
    return attack("resnet20", 2, 6)
