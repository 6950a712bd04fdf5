"""Entropy pruning against NumPy histograms; what it does to attacked models with clean and with poisoned data."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError
from lightning_bd.callbacks.defense.entropy_pruning import EntropyPruning
from lightning_bd.datamodules import DigitsDataModule

Pairs = Iterator[tuple[Tensor, Tensor]]
IMAGES = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0))

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: backbones.small_cnn(3, in_channels=1, width=16),
    "resnet18": lambda: backbones.resnet18(3, in_channels=1, width=8),
    "preact_resnet18": lambda: backbones.preact_resnet18(3, in_channels=1, width=8),
    "vgg11_bn": lambda: backbones.vgg11_bn(3, in_channels=1, width=8),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)),
}


class Attacked(Protocol):
    """What conftest's fixtures are."""

    trained: nn.Module
    data: DefenderData
    datamodule: DigitsDataModule

    def model(self) -> nn.Module: ...
    def rates(self, model: nn.Module) -> tuple[float, float]: ...
    def check_removed(self, model: nn.Module) -> tuple[float, float]: ...


def make_model(name: str) -> nn.Module:
    """A network of random weights; partly in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name]().train()
        for _ in range(5):
            model(torch.rand(16, 1, 16, 16))
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.Linear)).eval()
    return model


def refuse() -> Pairs:
    raise AssertionError("not to be looked at")


def make_data(images: Tensor = IMAGES) -> DefenderData:
    """Batches of uneven sizes; only epoch 0 has any."""
    labels = torch.zeros(len(images)).long()
    return DefenderData(
        lambda epoch: iter(
            list(zip(torch.split(images, 25), torch.split(labels, 25), strict=True)) if epoch == 0 else []
        ),
        refuse,
        3,
    )


def maxima_of(model: nn.Module) -> dict[str, np.ndarray]:
    """The largest input of each normalisation's channels, ``(N, C)`` float64, of a copy in evaluation mode."""
    found: dict[str, list[Tensor]] = {}
    twin = copy.deepcopy(model).eval()
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):

            def keep(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                values = inputs[0] if inputs[0].ndim == 2 else inputs[0].amax(dim=(2, 3))
                found.setdefault(name, []).append(values)

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for images in torch.split(IMAGES, 25):
            twin(images)
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def entropy(values: np.ndarray, width: float) -> float:
    standard = (values - values.mean()) / values.std()
    counts: dict[int, int] = {}
    for value in standard:
        number = math.floor((value - standard.min()) / width)
        counts[number] = counts.get(number, 0) + 1
    return -sum(count / len(values) * math.log(count / len(values)) for count in counts.values())


@pytest.mark.parametrize("width", [0.1, 0.4])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_histograms_by_hand(name: str, width: float) -> None:
    u = 1.5
    model = make_model(name)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    counts = {}
    for norm, values in maxima_of(model).items():
        entropies = np.array([entropy(column, width) for column in values.T])
        below = torch.from_numpy(entropies < entropies.mean() - u * entropies.std(ddof=1))
        expected[f"{norm}.weight"][below] = 0
        expected[f"{norm}.bias"][below] = 0
        counts[f"pruned/{norm}"] = int(below.sum())
    report = EntropyPruning(u, width).purify(model, make_data())
    assert sum(counts.values()) > 0
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert {key: value for key, value in report.values.items() if "/" in key} == counts
    assert report.note == f"pruned {sum(counts.values())} of {int(report.values['channels'])} channels"


@pytest.mark.parametrize("name", NETWORKS)
def test_leaves_no_trace(name: str) -> None:
    model = make_model(name)
    modes = {key: module.training for key, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = EntropyPruning(1e6).purify(model, make_data())
    assert report.values["pruned"] == 0
    assert "no channel exceeded the threshold" in report.note
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_two_groups_are_found_and_constants_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2)).eval()
    points = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    points[:50, 3] += 10
    points[:, 7] = 0.25
    report = EntropyPruning(bin_width=0.1).purify(model, make_data(points))
    assert (model[0].weight == 0).nonzero().flatten().tolist() == [3]  # type: ignore[union-attr]
    assert report.note == "pruned 1 of 32 channels"


def test_two_runs_agree() -> None:
    models = [make_model("resnet18") for _ in range(2)]
    reports = [EntropyPruning(1.5).purify(model, make_data()) for model in models]
    assert reports[0] == reports[1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_frozen_and_unused_layers_are_left_alone() -> None:
    model = make_model("small_cnn")
    model.add_module("unused", nn.BatchNorm2d(16))
    frozen = model.get_submodule("features.1").requires_grad_(False)
    weight = frozen.weight.clone()  # type: ignore[operator]
    report = EntropyPruning(0.0).purify(model, make_data())
    assert torch.equal(frozen.weight, weight)  # type: ignore[arg-type]
    assert list(report.values) == ["u", "pruned", "channels", "pruned/features.5"]
    assert report.values["pruned"] > 0


def test_needs_no_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, track_running_stats=False))
    assert EntropyPruning(1.0).purify(model, make_data()).values["pruned"] > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, affine=False)),
        lambda: make_model("resnet18").requires_grad_(False),
        lambda: VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3),
    ],
)
def test_not_applicable(make: Callable[[], nn.Module]) -> None:
    model = make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(NotApplicableError, match="what goes into a batch normalisation and prunes there"):
        EntropyPruning(0.0).purify(model, make_data())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_no_training_images() -> None:
    with pytest.raises(MisconfigurationException, match="no training images: give the phase a larger split"):
        EntropyPruning().purify(make_model("small_cnn"), DefenderData(lambda epoch: iter([]), refuse, 3))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `u` to be a non-negative float or several of them"):
        EntropyPruning([-1.0])
    with pytest.raises(ValueError, match=r"Expected argument `max_drop` to be in \[0, 1\]"):
        EntropyPruning(max_drop=-0.1)
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"Expected argument `bin_width` to be a positive float, but got {width}"):
            EntropyPruning(bin_width=width)


def suspicious(attacked: Attacked) -> DefenderData:
    """The poisoned training set itself, as a defender holds it who has trained on it."""
    datamodule = attacked.datamodule

    def train(epoch: int) -> Pairs:
        for raw in datamodule.train_dataloader():
            yield datamodule.on_after_batch_transfer(raw, 0)[:2]

    return DefenderData(train, attacked.data.validation, attacked.data.num_classes)


def test_forgets_badnets_with_the_suspicious_training_set(
    attacked_resnet: Attacked, attacked_small_cnn: Attacked
) -> None:
    """The shipped default on the deep network; wide bins on the small one, because there are 879 images."""
    for attacked, defense in ((attacked_resnet, EntropyPruning()), (attacked_small_cnn, EntropyPruning(bin_width=0.1))):
        model = attacked.model()
        report = defense.purify(model, suspicious(attacked))
        attacked.check_removed(model)
        assert 0 < report.values["pruned"] < 0.05 * report.values["channels"]


def test_clean_images_do_not_show_the_trigger(attacked_resnet: Attacked, attacked_small_cnn: Attacked) -> None:
    """What a defending phase gets: some channels are pruned, and attack and accuracy stay."""
    for attacked in (attacked_resnet, attacked_small_cnn):
        model = attacked.model()
        report = EntropyPruning().purify(model, attacked.data)
        accuracy, success = attacked.rates(model)
        assert report.values["pruned"] > 0
        assert accuracy >= attacked.rates(attacked.trained)[0] - 0.03
        assert success > 0.9
