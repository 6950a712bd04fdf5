"""A plain BadNets model on scikit-learn's digits, its defender's data, and how the attack is measured."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bd import backbones
from lightning_bd.batch import Sample
from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.datamodules.images import ImageSet, TensorImages
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

log = logging.getLogger(__name__)

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
        """Fail unless ASR fell by 20 points or more and clean accuracy by 3 points or less; return the new rates.

        All four are logged.
        """
        accuracy, success = self.rates(self.trained)
        after_accuracy, after_success = self.rates(model)
        log.info(
            "clean accuracy %.1f -> %.1f, ASR %.1f -> %.1f",
            100 * accuracy, 100 * after_accuracy, 100 * success, 100 * after_success,
        )  # fmt: skip
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
            loader.place = partial(lambda fixed: fixed, place)
            for raw in loader:
                images, labels = datamodule.on_after_batch_transfer(raw, 0)[:2]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
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


class Statistics:
    """Defenses that prune the channels whose statistic is far from those of their layer; what their tests share."""

    networks: Mapping[str, Callable[[], nn.Module]] = {
        "small_cnn": lambda: backbones.small_cnn(3, in_channels=1, width=16),
        "resnet18": lambda: backbones.resnet18(3, in_channels=1, width=8),
        "preact_resnet18": lambda: backbones.preact_resnet18(3, in_channels=1, width=8),
        "vgg11_bn": lambda: backbones.vgg11_bn(3, in_channels=1, width=8),
        "flat": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(256, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)
        ),
    }

    def images(self, count: int) -> Tensor:
        return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def model(self, name: str, prepare: Callable[[nn.Module], None]) -> nn.Module:
        """A network that ``prepare`` has given weights and statistics; partly in training mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.networks[name]().train()
            prepare(model)
        next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.Linear)).eval()
        return model

    def refuse(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("not to be looked at")

    def data(self, images: Tensor, size: int) -> DefenderData:
        """Batches of uneven sizes; only epoch 0 has any, and nothing is validated."""
        labels = torch.zeros(len(images)).long()
        batches = list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
        return DefenderData(lambda epoch: iter(batches if epoch == 0 else []), self.refuse, 3)

    def inputs(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """What goes into each normalisation, in one forward pass of a copy in evaluation mode."""
        found: dict[str, Tensor] = {}
        twin = copy.deepcopy(model).eval()
        for name, module in twin.named_modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):

                def keep(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                    found[name] = inputs[0].double()

                module.register_forward_pre_hook(keep)
        with torch.no_grad():
            twin(images)
        return found

    def check_pruned(
        self, defense: Defense, model: nn.Module, data: DefenderData, pruned: Mapping[str, tuple[str, Tensor]]
    ) -> None:
        """Fail unless exactly the channels that ``pruned`` marks, by the name of what is reported, are pruned.

        Each stands with the name of the normalisation whose channels they are.
        """
        expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for norm, mask in pruned.values():
            expected[f"{norm}.weight"][mask] = 0
            expected[f"{norm}.bias"][mask] = 0
        counts = {f"pruned/{name}": int(mask.sum()) for name, (_, mask) in pruned.items()}
        report = defense.purify(model, data)
        assert sum(counts.values()) > 0
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[key]), key
        assert {key: value for key, value in report.values.items() if "/" in key} == counts
        assert report.values["pruned"] == sum(counts.values())
        assert report.note == f"pruned {sum(counts.values())} of {int(report.values['channels'])} channels"

    def check_no_trace(self, defense: Defense, model: nn.Module, data: DefenderData) -> None:
        """Fail unless a threshold that no channel exceeds leaves everything as it was."""
        modes = {key: module.training for key, module in model.named_modules()}
        assert len(set(modes.values())) == 2
        state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        report = defense.purify(model, data)
        assert report.values["pruned"] == 0
        assert "no channel exceeded the threshold" in report.note
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert {key: module.training for key, module in model.named_modules()} == modes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), random)

    def check_unused_left_alone(self, defense: Defense, model: nn.Module, data: DefenderData) -> Report:
        """Fail unless a small_cnn's frozen layer and one that never runs are not pruned."""
        model.add_module("unused", nn.BatchNorm2d(16))
        frozen = model.get_submodule("features.1").requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
        report = defense.purify(model, data)
        assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
        return report

    def check_refused(self, defense: Defense, model: nn.Module, data: DefenderData, message: str) -> None:
        """Fail unless the model is refused before it is changed."""
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(NotApplicableError, match=message):
            defense.purify(model, data)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    def check_empty_refused(self, defense: Defense, model: nn.Module) -> None:
        with pytest.raises(MisconfigurationException, match="no training images: give the phase a larger split"):
            defense.purify(model, DefenderData(lambda epoch: iter([]), self.refuse, 3))


@pytest.fixture
def statistics() -> Statistics:
    return Statistics()
