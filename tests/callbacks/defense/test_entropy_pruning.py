"""Entropy pruning against NumPy histograms; what it does to attacked models with clean and with poisoned data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData
from lightning_bd.callbacks.defense.entropy_pruning import EntropyPruning

if TYPE_CHECKING:
    from tests.callbacks.defense.conftest import Attacked, Statistics

NAMES = ("small_cnn", "resnet18", "preact_resnet18", "vgg11_bn", "flat")

Pairs = Iterator[tuple[Tensor, Tensor]]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: backbones.small_cnn(3, in_channels=1, width=16),
    "resnet18": lambda: backbones.resnet18(3, in_channels=1, width=8),
    "preact_resnet18": lambda: backbones.preact_resnet18(3, in_channels=1, width=8),
    "vgg11_bn": lambda: backbones.vgg11_bn(3, in_channels=1, width=8),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)),
}


def make_model(statistics: Statistics, name: str) -> nn.Module:
    def prepare(model: nn.Module) -> None:
        for _ in range(5):
            model(torch.rand(16, 1, 16, 16))

    return statistics.model(name, prepare)


def entropy(values: np.ndarray, width: float) -> float:
    standard = (values - values.mean()) / values.std()
    counts: dict[int, int] = {}
    for value in standard:
        number = math.floor((value - standard.min()) / width)
        counts[number] = counts.get(number, 0) + 1
    return -sum(count / len(values) * math.log(count / len(values)) for count in counts.values())


def make_data(statistics: Statistics, images: Tensor | None = None) -> DefenderData:
    return statistics.data(statistics.images(60) if images is None else images, 25)


@pytest.mark.parametrize("width", [0.1, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_histograms_by_hand(statistics: Statistics, name: str, width: float) -> None:
    u = 1.5
    model, pruned, u = make_model(statistics, name), {}, 1.5
    for norm, values in statistics.inputs(model, statistics.images(60)).items():
        maxima = (values if values.ndim == 2 else values.amax(dim=(2, 3))).numpy()
        entropies = np.array([entropy(column, width) for column in maxima.T])
        pruned[norm] = (norm, torch.from_numpy(entropies < entropies.mean() - u * entropies.std(ddof=1)))
    statistics.check_pruned(EntropyPruning(u, width), model, make_data(statistics), pruned)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_no_trace(statistics: Statistics, name: str) -> None:
    statistics.check_no_trace(EntropyPruning(1e6), make_model(statistics, name), make_data(statistics))


def test_two_groups_are_found_and_constants_left_alone(statistics: Statistics) -> None:
    model = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2)).eval()
    points = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    points[:50, 3] += 10
    points[:, 7] = 0.25
    report = EntropyPruning(bin_width=0.1).purify(model, make_data(statistics, points))
    assert (model[0].weight == 0).nonzero().flatten().tolist() == [3]  # type: ignore[union-attr]
    assert report.note == "pruned 1 of 32 channels"


def test_two_runs_agree(statistics: Statistics) -> None:
    models = [make_model(statistics, "resnet18") for _ in range(2)]
    reports = [EntropyPruning(1.5).purify(model, make_data(statistics)) for model in models]
    assert reports[0] == reports[1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_frozen_and_unused_layers_are_left_alone(statistics: Statistics) -> None:
    model = make_model(statistics, "small_cnn")
    report = statistics.check_unused_left_alone(EntropyPruning(0.0), model, make_data(statistics))
    assert list(report.values) == ["u", "pruned", "channels", "pruned/features.5"]
    assert report.values["pruned"] > 0


def test_needs_no_running_statistics(statistics: Statistics) -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, track_running_stats=False))
    assert EntropyPruning(1.0).purify(model, make_data(statistics)).values["pruned"] > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, affine=False)),
        lambda: VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3),
        None,
    ],
)
def test_not_applicable(statistics: Statistics, make: Callable[[], nn.Module] | None) -> None:
    """The last is frozen."""
    model, images = make() if make else make_model(statistics, "resnet18").requires_grad_(False), statistics.images(60)
    message = "what goes into a batch normalisation and prunes there"
    statistics.check_refused(EntropyPruning(0.0), model, make_data(statistics, images), message)


def test_no_training_images(statistics: Statistics) -> None:
    statistics.check_empty_refused(EntropyPruning(), make_model(statistics, "small_cnn"))


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
