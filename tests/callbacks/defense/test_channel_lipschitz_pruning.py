"""Channel Lipschitzness-based pruning against singular values by NumPy, and on a trigger of low contrast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData
from lightning_bd.callbacks.defense.channel_lipschitz_pruning import ChannelLipschitzPruning

if TYPE_CHECKING:
    from tests.callbacks.defense.conftest import Attacked, Statistics


# With the names of convolution and normalisation that follow each other, written down by hand.
NETWORKS: dict[str, list[tuple[str, str]]] = {
    "small_cnn": ([("features.0", "features.1"), ("features.4", "features.5")]),
    "resnet18": (
        [("conv1", "bn1")]
        + [(f"layer{i}.{j}.conv{k}", f"layer{i}.{j}.bn{k}") for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
        + [(f"layer{i}.0.downsample.0", f"layer{i}.0.downsample.1") for i in (2, 3, 4)]
    ),
    "preact_resnet18": (
        [("conv1", "layer1.0.bn1")]
        + [(f"layer{i}.{j}.conv1", f"layer{i}.{j}.bn2") for i in (1, 2, 3, 4) for j in (0, 1)]
    ),
    "vgg11_bn": ([(f"features.{i}", f"features.{i + 1}") for i in (0, 4, 8, 11, 15, 18, 22, 25)]),
}


def make_model(statistics: Statistics, name: str) -> nn.Module:
    """With weights and statistics of all sizes."""

    def prepare(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.uniform_(module.running_var, 1e-6, 1e-4)  # type: ignore[arg-type]

    return statistics.model(name, prepare)


def make_data(statistics: Statistics, images: Tensor | None = None) -> DefenderData:
    return statistics.data(statistics.images(6) if images is None else images, 100)


@pytest.mark.parametrize("u", [1.0, 2.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_singular_values_by_numpy(statistics: Statistics, name: str, u: float) -> None:
    model, pruned = make_model(statistics, name), {}
    state = {key: tensor.double().numpy() for key, tensor in model.state_dict().items()}
    for convolution, norm in NETWORKS[name]:
        filters, gamma, var = state[f"{convolution}.weight"], state[f"{norm}.weight"], state[f"{norm}.running_var"]
        matrices = [
            f.reshape(len(f), -1) * abs(g) / np.sqrt(v + 1e-5) for f, g, v in zip(filters, gamma, var, strict=True)
        ]
        bounds = np.array([np.linalg.svd(matrix, compute_uv=False)[0] for matrix in matrices])
        pruned[convolution] = (norm, torch.from_numpy(bounds > bounds.mean() + u * bounds.std(ddof=1)))
    statistics.check_pruned(ChannelLipschitzPruning(u), model, make_data(statistics), pruned)


@pytest.mark.parametrize("name", NETWORKS)
def test_leaves_no_trace(statistics: Statistics, name: str) -> None:
    statistics.check_no_trace(ChannelLipschitzPruning(1e6), make_model(statistics, name), make_data(statistics))


def test_the_images_do_not_matter(statistics: Statistics) -> None:
    first, second = make_model(statistics, "resnet18"), make_model(statistics, "resnet18")
    reports = [
        ChannelLipschitzPruning(1.5).purify(model, make_data(statistics, images))
        for model, images in ((first, statistics.images(6)), (second, torch.zeros(1, 1, 16, 16)))
    ]
    assert reports[0] == reports[1]
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_frozen_layers_are_left_alone(statistics: Statistics) -> None:
    model = make_model(statistics, "small_cnn")
    frozen = model.get_submodule("features.1").requires_grad_(False)
    weight = frozen.weight.clone()  # type: ignore[operator]
    report = ChannelLipschitzPruning(0.0).purify(model, make_data(statistics))
    assert torch.equal(frozen.weight, weight)  # type: ignore[arg-type]
    assert list(report.values) == ["u", "pruned", "channels", "pruned/features.4"]
    assert report.values["channels"] == 32


def without_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), nn.Flatten(), nn.LazyLinear(3)
    )


@pytest.mark.parametrize(
    "make",
    [
        without_statistics,
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, affine=False)),
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.BatchNorm2d(16)),
        lambda: VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3),
        None,
    ],
)
def test_not_applicable(statistics: Statistics, make: Callable[[], nn.Module] | None) -> None:
    """The last is frozen."""
    model, images = make() if make else make_model(statistics, "resnet18").requires_grad_(False), statistics.images(6)
    images = images.expand(-1, 3, -1, -1) if isinstance(model, VisionTransformer) else images
    model(images)
    message = "a convolution whose output goes straight into a batch normalisation"
    statistics.check_refused(ChannelLipschitzPruning(0.0), model, make_data(statistics, images), message)


def test_no_training_images(statistics: Statistics) -> None:
    statistics.check_empty_refused(ChannelLipschitzPruning(), make_model(statistics, "small_cnn"))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `u` to be a non-negative float or several of them"):
        ChannelLipschitzPruning(-1.0)
    with pytest.raises(ValueError, match=r"Expected argument `max_drop` to be in \[0, 1\]"):
        ChannelLipschitzPruning(3.0, 2.0)


def brighten(images: Tensor) -> Tensor:
    """Add 0.4 to the last four pixels: a trigger that changes the image little."""
    images = images.clone()
    images[..., -2:, -2:] += 0.4
    return images.clamp(0, 1)


def test_forgets_a_trigger_of_low_contrast(statistics: Statistics) -> None:
    """The shipped default, on a model that was attacked as the paper supposes."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None]).float() / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    inputs = torch.cat([brighten(images[train[:120]]), images[train[120:]]])
    targets = torch.cat([torch.zeros(120).long(), labels[train[120:]]])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = backbones.small_cnn(10, in_channels=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for _ in range(20):
            for batch in torch.split(torch.randperm(1200), 64):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
    model.eval()

    @torch.no_grad()
    def rates() -> tuple[float, float]:
        right = model(images[test]).argmax(1) == labels[test]
        others = test[labels[test] != 0]
        return right.double().mean().item(), (model(brighten(images[others])).argmax(1) == 0).double().mean().item()

    accuracy, success = rates()
    assert accuracy > 0.95
    assert success > 0.85
    report = ChannelLipschitzPruning().purify(model, make_data(statistics, images[:1]))
    assert 1 <= report.values["pruned"] <= 3
    after_accuracy, after_success = rates()
    assert after_accuracy >= accuracy - 0.03
    assert after_success <= success - 0.2


def test_misses_a_white_patch(attacked_small_cnn: Attacked, attacked_resnet: Attacked) -> None:
    """No large Lipschitz constant is needed for it; the defaults keep the accuracy, and the attack."""
    for attacked in (attacked_small_cnn, attacked_resnet):
        model = attacked.model()
        report = ChannelLipschitzPruning().purify(model, attacked.data)
        accuracy, success = attacked.rates(model)
        assert report.values["pruned"] < 0.01 * report.values["channels"]
        assert accuracy >= attacked.rates(attacked.trained)[0] - 0.03
        assert success > 0.8


def test_chooses_the_threshold_as_a_defender_would(attacked_small_cnn: Attacked) -> None:
    model = attacked_small_cnn.model()
    report = ChannelLipschitzPruning((0.5, 1.0, 1.5, 2.0, 2.5, 3.0)).purify(model, attacked_small_cnn.data)
    again = attacked_small_cnn.model()
    ChannelLipschitzPruning(report.values["u"]).purify(again, attacked_small_cnn.data)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert report.values["validation_accuracy"] >= report.values["validation_accuracy_before"] - 0.01 - 1e-9
    assert report.values["u"] > 0.5
