"""Batch-norm pruning against torch.distributions on all inputs at once, and on attacked models."""

import copy
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torchvision.models import VisionTransformer

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError
from lightning_bd.callbacks.defense.batch_norm_pruning import BatchNormPruning
from lightning_bd.datamodules import DigitsDataModule

Pairs = Iterator[tuple[Tensor, Tensor]]
IMAGES = torch.rand(14, 1, 16, 16, generator=torch.Generator().manual_seed(0))

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
    """A network whose statistics come from other images; partly in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.1)
                nn.init.normal_(module.bias)
        model.train()
        for _ in range(5):
            model(torch.rand(16, 1, 16, 16).square())
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.Linear)).eval()
    return model


def refuse() -> Pairs:
    raise AssertionError("not to be looked at")


def make_data(images: Tensor = IMAGES) -> DefenderData:
    """Batches of uneven sizes; only epoch 0 has any."""
    labels = torch.zeros(len(images)).long()
    return DefenderData(
        lambda epoch: iter(
            list(zip(torch.split(images, 5), torch.split(labels, 5), strict=True)) if epoch == 0 else []
        ),
        refuse,
        3,
    )


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What goes into each normalisation, as float64 ``(C, N)``, in one forward pass of a copy."""
    found: dict[str, Tensor] = {}
    twin = copy.deepcopy(model).eval()
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):

            def keep(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                found[name] = inputs[0].double().swapaxes(0, 1).flatten(1)

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        twin(images)
    return found


@pytest.mark.parametrize("u", [1.0, 1.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_torch_distributions(name: str, u: float) -> None:
    model = make_model(name)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    counts = {}
    for norm, values in inputs_of(model, IMAGES).items():
        clean = Normal(values.mean(1), (values.var(1) + 1e-5).sqrt())
        stored = Normal(
            expected[f"{norm}.running_mean"].double(), (expected[f"{norm}.running_var"].double() + 1e-5).sqrt()
        )
        divergence = kl_divergence(clean, stored)
        above = divergence > divergence.mean() + u * divergence.std()
        expected[f"{norm}.weight"][above] = 0
        expected[f"{norm}.bias"][above] = 0
        counts[f"pruned/{norm}"] = int(above.sum())
    report = BatchNormPruning(u).purify(model, make_data())
    assert sum(counts.values()) > 0
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert {key: value for key, value in report.values.items() if "/" in key} == counts
    assert report.values["pruned"] == sum(counts.values())
    assert report.note == f"pruned {sum(counts.values())} of {int(report.values['channels'])} channels"


@pytest.mark.parametrize("name", NETWORKS)
def test_leaves_no_trace(name: str) -> None:
    model = make_model(name)
    modes = {key: module.training for key, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = BatchNormPruning(1e6).purify(model, make_data())
    assert report.values["pruned"] == 0
    assert "no channel exceeded the threshold" in report.note
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_batches_do_not_matter_and_two_runs_agree() -> None:
    models = [make_model("resnet18") for _ in range(3)]
    whole = DefenderData(lambda epoch: iter([(IMAGES, torch.zeros(14))]), refuse, 3)
    reports = [
        BatchNormPruning(1.5).purify(model, data)
        for model, data in zip(models, (make_data(), make_data(), whole), strict=True)
    ]
    assert reports[0] == reports[1] == reports[2]
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))


def test_a_channel_that_is_silent_on_clean_data_is_pruned() -> None:
    """Its clean variance is 0: without eps the divergence would be infinite, and the layer's mean unknown."""
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2)).eval()
    points = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    points[:, 3] = 0
    report = BatchNormPruning().purify(model, make_data(points))
    assert report.values["pruned"] == 1
    assert (model[0].weight == 0).nonzero().flatten().tolist() == [3]  # type: ignore[union-attr]


def test_frozen_and_unused_layers_are_left_alone() -> None:
    model = make_model("small_cnn")
    model.add_module("unused", nn.BatchNorm2d(16))
    frozen = model.get_submodule("features.1").requires_grad_(False)
    weight = frozen.weight.clone()  # type: ignore[operator]
    report = BatchNormPruning(0.0).purify(model, make_data())
    assert torch.equal(frozen.weight, weight)  # type: ignore[arg-type]
    assert list(report.values) == ["u", "pruned", "channels", "pruned/features.5"]
    assert report.values["channels"] == 32


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, track_running_stats=False)),
        lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16, affine=False)),
        lambda: make_model("resnet18").requires_grad_(False),
        lambda: VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3),
    ],
)
def test_not_applicable(make: Callable[[], nn.Module]) -> None:
    model = make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(NotApplicableError, match="needs a batch normalisation that has some"):
        BatchNormPruning(0.0).purify(model, make_data())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_normalisation_that_never_runs() -> None:
    model = nn.Sequential(nn.Flatten())
    model.register_module("unused", None)
    model.unused = nn.BatchNorm1d(4)
    model.forward = lambda images: images.flatten(1)  # type: ignore[method-assign]
    with pytest.raises(NotApplicableError, match="this model has none"):
        BatchNormPruning().purify(model, make_data())


def test_no_training_images() -> None:
    with pytest.raises(MisconfigurationException, match="no training images: give the phase a larger split"):
        BatchNormPruning().purify(make_model("small_cnn"), DefenderData(lambda epoch: iter([]), refuse, 3))


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
