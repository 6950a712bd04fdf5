"""Batch-norm pruning against torch.distributions on all inputs at once, and on attacked models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torchvision.models import VisionTransformer

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError
from lightning_bd.callbacks.defense.batch_norm_pruning import BatchNormPruning

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: backbones.small_cnn(3, in_channels=1, width=16),
    "resnet18": lambda: backbones.resnet18(3, in_channels=1, width=8),
    "preact_resnet18": lambda: backbones.preact_resnet18(3, in_channels=1, width=8),
    "vgg11_bn": lambda: backbones.vgg11_bn(3, in_channels=1, width=8),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)),
}

if TYPE_CHECKING:
    from tests.callbacks.defense.conftest import Attacked, Statistics

NAMES = ("small_cnn", "resnet18", "preact_resnet18", "vgg11_bn", "flat")


def make_model(statistics: Statistics, name: str) -> nn.Module:
    """Its statistics come from other images."""

    def prepare(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.1)
                nn.init.normal_(module.bias)
        for _ in range(5):
            model(torch.rand(16, 1, 16, 16).square())

    return statistics.model(name, prepare)


def make_data(statistics: Statistics, images: Tensor | None = None) -> DefenderData:
    return statistics.data(statistics.images(14) if images is None else images, 5)


@pytest.mark.parametrize("u", [1.0, 1.5])
@pytest.mark.parametrize("name", NAMES)
def test_equals_torch_distributions(statistics: Statistics, name: str, u: float) -> None:
    model, pruned = make_model(statistics, name), {}
    for norm, values in statistics.inputs(model, statistics.images(14)).items():
        channels = values.swapaxes(0, 1).flatten(1)
        mean, var = (model.state_dict()[f"{norm}.running_{key}"].double() for key in ("mean", "var"))
        clean = Normal(channels.mean(1), (channels.var(1) + 1e-5).sqrt())
        stored = Normal(mean, (var + 1e-5).sqrt())
        divergence = kl_divergence(clean, stored)
        pruned[norm] = (norm, divergence > divergence.mean() + u * divergence.std())
    statistics.check_pruned(BatchNormPruning(u), model, make_data(statistics), pruned)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_no_trace(statistics: Statistics, name: str) -> None:
    statistics.check_no_trace(BatchNormPruning(1e6), make_model(statistics, name), make_data(statistics))


def test_batches_do_not_matter_and_two_runs_agree(statistics: Statistics) -> None:
    models = [make_model(statistics, "resnet18") for _ in range(3)]
    whole = DefenderData(lambda epoch: iter([(statistics.images(14), torch.zeros(14))]), statistics.refuse, 3)
    reports = [
        BatchNormPruning(1.5).purify(model, data)
        for model, data in zip(models, (make_data(statistics), make_data(statistics), whole), strict=True)
    ]
    assert reports[0] == reports[1] == reports[2]
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))


def test_a_channel_that_is_silent_on_clean_data_is_pruned(statistics: Statistics) -> None:
    """Its clean variance is 0: without eps the divergence would be infinite, and the layer's mean unknown."""
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2)).eval()
    points = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    points[:, 3] = 0
    report = BatchNormPruning().purify(model, make_data(statistics, points))
    assert report.values["pruned"] == 1
    assert (model[0].weight == 0).nonzero().flatten().tolist() == [3]  # type: ignore[union-attr]


def test_frozen_and_unused_layers_are_left_alone(statistics: Statistics) -> None:
    model = make_model(statistics, "small_cnn")
    report = statistics.check_unused_left_alone(BatchNormPruning(0.0), model, make_data(statistics))
    assert list(report.values) == ["u", "pruned", "channels", "pruned/features.5"]
    assert report.values["channels"] == 32


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, track_running_stats=False)),
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, affine=False)),
        lambda: VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3),
        None,
    ],
)
def test_not_applicable(statistics: Statistics, make: Callable[[], nn.Module] | None) -> None:
    """The last is frozen."""
    model, images = make() if make else make_model(statistics, "resnet18").requires_grad_(False), statistics.images(14)
    message = "needs a batch normalisation that has some"
    statistics.check_refused(BatchNormPruning(0.0), model, make_data(statistics, images), message)


def test_no_training_images(statistics: Statistics) -> None:
    statistics.check_empty_refused(BatchNormPruning(), make_model(statistics, "small_cnn"))


def test_a_normalisation_that_never_runs(statistics: Statistics) -> None:
    model = nn.Sequential(nn.Flatten())
    model.register_module("unused", None)
    model.unused = nn.BatchNorm1d(4)
    model.forward = lambda images: images.flatten(1)  # type: ignore[method-assign]
    with pytest.raises(NotApplicableError, match="this model has none"):
        BatchNormPruning().purify(model, make_data(statistics))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `u` to be a non-negative float or several of them"):
        BatchNormPruning([])
    with pytest.raises(ValueError, match=r"Expected argument `max_drop` to be in \[0, 1\]"):
        BatchNormPruning(3.0, -0.1)


def test_forgets_badnets(attacked_resnet: Attacked) -> None:
    """With the threshold chosen on validation images, as a defender would."""
    model = attacked_resnet.model()
    report = BatchNormPruning((2.5, 3.0, 3.5, 4.0)).purify(model, attacked_resnet.data)
    attacked_resnet.check_removed(model)
    assert 0 < report.values["pruned"] < 0.05 * report.values["channels"]
    assert report.values["validation_accuracy"] >= report.values["validation_accuracy_before"] - 0.01 - 1e-9


def test_the_default_lowers_the_attack_success(attacked_resnet: Attacked, attacked_small_cnn: Attacked) -> None:
    """At 3 the deep network loses about 3 points of accuracy, and of the small one a single channel is pruned."""
    for attacked, fall, drop in ((attacked_resnet, 0.2, 0.06), (attacked_small_cnn, 0.05, 0.03)):
        model = attacked.model()
        BatchNormPruning().purify(model, attacked.data)
        before, after = attacked.rates(attacked.trained), attacked.rates(model)
        assert after[1] <= before[1] - fall
        assert after[0] >= before[0] - drop
