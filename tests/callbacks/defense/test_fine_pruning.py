"""Fine-pruning against masked features, brute force and a training loop written by hand."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Protocol

import pytest
import torch
import torchvision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError
from lightning_bd.callbacks.defense.fine_pruning import FinePruning

CLASSES, WIDTH = 3, 30
Pairs = Iterator[tuple[Tensor, Tensor]]


class Attacked(Protocol):
    """What the fixtures give."""

    data: DefenderData

    def model(self) -> nn.Module: ...

    def check_removed(self, model: nn.Module) -> tuple[float, float]: ...


def make_batches(sizes: Sequence[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Noisy 4x4 pictures of three patterns."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    batches = []
    for size in sizes:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        batches.append((patterns[labels] + 0.3 * torch.randn(size, 1, 4, 4, generator=generator), labels))
    return batches


TRAIN, VALIDATION = make_batches((16, 16, 9), 0), make_batches((64, 36), 1)


def train_batches(epoch: int) -> Pairs:
    """Each epoch has an order of its own, so that a wrong epoch number shows."""
    return iter([*TRAIN[epoch % 3 :], *TRAIN[: epoch % 3]])


def make_data(epoch_limit: int | None = None) -> DefenderData:
    return DefenderData(train_batches, lambda: iter(VALIDATION), CLASSES, epoch_limit)


class Net(nn.Module):
    """A convolution with batch normalisation, the mean over space, the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTH, 3)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.maps(x).mean((2, 3)))
        return logits


def make_net() -> Net:
    return copy.deepcopy(_trained_net())


@cache
def _trained_net() -> Net:
    torch.manual_seed(0)
    model = Net()
    train_by_hand(model, 0.1, epochs=15)
    return model.eval()


def train_by_hand(model: Net, rate: float, epochs: int, pruned: Sequence[int] = ()) -> None:
    """SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule; the pruned channels multiplied by zero."""
    model.train()
    alive = torch.ones(WIDTH)
    alive[list(pruned)] = 0
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(epochs):
        lr = rate * (1 + torch.cos(torch.tensor(torch.pi * epoch / epochs)).item()) / 2
        for images, labels in train_batches(epoch):
            logits = model.fc(model.maps(images).mean((2, 3)) * alive)
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(0.9).add_(g + 5e-4 * p)
                    p.sub_(lr * v)
    model.eval()


@torch.no_grad()
def masked_logits(model: Net, images: Tensor, pruned: Sequence[int]) -> Tensor:
    """Mask the output maps of the last convolutional block, as the paper prunes."""
    maps = model.maps(images)
    maps[:, list(pruned)] = 0
    logits: Tensor = model.fc(maps.mean((2, 3)))
    return logits


def masked_accuracy(model: Net, pruned: Sequence[int]) -> float:
    right = [masked_logits(model, images, pruned).argmax(1) == labels for images, labels in VALIDATION]
    return float(torch.cat(right).float().mean())


@torch.no_grad()
def order_by_hand(model: Net) -> list[int]:
    activity = torch.cat([model.maps(images) for images, _ in TRAIN]).mean((0, 2, 3))
    return sorted(range(WIDTH), key=lambda channel: float(activity[channel]))


def allowed(model: Net, max_drop: float) -> int:
    """How many channels go: one more would cost too much, or be the last."""
    order, full = order_by_hand(model), masked_accuracy(model, [])
    for count in range(1, WIDTH):
        if full - masked_accuracy(model, order[:count]) > max_drop + 1e-6:
            return count - 1
    return WIDTH - 1


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("max_drop", [0.0, 0.04, 0.2, 1.0])
def test_pruning_equals_masked_maps_and_brute_force(max_drop: float) -> None:
    reference, model = make_net(), make_net()
    report = FinePruning(max_drop, epochs=0).purify(model, make_data())
    order, count = order_by_hand(reference), allowed(reference, max_drop)
    assert report.tensors["fc"].tolist() == order
    assert report.values["pruned"] == count
    assert report.note == f"{count} of {WIDTH} channels pruned"
    assert report.values["validation_accuracy_before"] == pytest.approx(masked_accuracy(reference, []))
    assert report.values["validation_accuracy"] == pytest.approx(masked_accuracy(reference, order[:count]))
    assert report.values["validation_accuracy_pruned"] == report.values["validation_accuracy"]
    assert report.epochs == 0
    images = VALIDATION[0][0]
    assert torch.allclose(model(images), masked_logits(reference, images, order[:count]), atol=1e-6)
    with torch.no_grad():
        reference.fc.weight[:, order[:count]] = 0
    assert same(model, reference)


def test_the_limits_differ() -> None:
    counts = [allowed(make_net(), max_drop) for max_drop in (0.0, 0.04, 0.2, 1.0)]
    assert counts == sorted(set(counts))
    assert 0 < counts[0] < counts[-1] == WIDTH - 1


def test_fine_tuning_equals_training_with_masked_features() -> None:
    reference, model = make_net(), make_net()
    order, count = order_by_hand(reference), allowed(reference, 0.04)
    report = FinePruning(0.04, epochs=3, learning_rate=0.05).purify(model, make_data())
    train_by_hand(reference, 0.05, 3, order[:count])
    assert report.epochs == 3
    assert report.values["pruned"] == count
    assert torch.equal(model.fc.weight[:, order[:count]], torch.zeros(CLASSES, count))
    with torch.no_grad():
        reference.fc.weight[:, order[:count]] = 0
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5), name
    assert report.values["validation_accuracy"] == pytest.approx(masked_accuracy(reference, order[:count]))
    assert report.values["validation_accuracy_pruned"] == pytest.approx(masked_accuracy(make_net(), order[:count]))


@pytest.mark.parametrize(("limit", "epochs"), [(None, 3), (2, 2)])
def test_the_runs_cap_applies_to_fine_tuning(limit: int | None, epochs: int) -> None:
    model, reference = make_net(), make_net()
    assert FinePruning(epochs=3).purify(model, make_data(limit)).epochs == epochs
    FinePruning(epochs=epochs).purify(reference, make_data())
    assert same(model, reference)


def test_the_unpruned_network_is_reported_on_demand() -> None:
    model = make_net()
    count = allowed(model, 0.04)
    report = FinePruning(epochs=3, report_unpruned=True).purify(model, make_data())
    assert same(model, make_net())
    assert report.note == f"unpruned; {count} of {WIDTH} channels could be"
    assert report.values["validation_accuracy"] == report.values["validation_accuracy_before"]
    assert report.values["validation_accuracy_pruned"] == pytest.approx(
        masked_accuracy(model, order_by_hand(model)[:count])
    )
    assert report.epochs == 0
    assert report.tensors["fc"].tolist() == order_by_hand(model)


def test_stages_prune_from_nothing_to_all_but_one() -> None:
    report = FinePruning(epochs=1).purify(make_net(), make_data())
    defense, model, reference = FinePruning(), make_net(), make_net()
    images = VALIDATION[0][0]
    positions = []
    for position in defense.stages(model, report):
        pruned = order_by_hand(reference)[: round(position * WIDTH)]
        assert torch.allclose(model(images), masked_logits(reference, images, pruned), atol=1e-6)
        positions.append(position)
    assert positions[0] == 0
    assert positions[-1] == (WIDTH - 1) / WIDTH
    assert len(positions) == 21
    assert positions == sorted(set(positions))
    assert defense.stage_axis == "share of channels pruned"


def test_few_channels_give_few_stages() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    defense = FinePruning(epochs=0)
    report = defense.purify(copy.deepcopy(model), make_data())
    assert list(defense.stages(model, report)) == [0, 0.25, 0.5, 0.75]


def test_signed_features_are_ordered_by_their_size() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    images = torch.zeros(4, 1, 4, 4)
    images.view(4, 16)[:, :] = torch.arange(16.0) - 8.25
    batch = images, torch.zeros(4).long()
    report = FinePruning(epochs=0).purify(model, DefenderData(lambda _: iter([batch]), lambda: iter([batch]), CLASSES))
    assert report.tensors["1"].tolist() == sorted(range(16), key=lambda channel: abs(channel - 8.25))


def footprint(model: nn.Module) -> list[object]:
    """All that a defense may not leave behind, but for weights."""
    return [
        [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        torch.get_rng_state().tolist(),
    ]


def mixed_net() -> Net:
    """Part of the network in training mode, part of it frozen."""
    model = make_net().train()
    model.bn.eval()
    model.conv.requires_grad_(False)
    return model


def test_no_trace() -> None:
    model = mixed_net()
    before = footprint(model)
    FinePruning(epochs=2).purify(model, make_data())
    assert footprint(model) == before
    assert torch.equal(model.conv.weight, mixed_net().conv.weight)


@pytest.mark.parametrize("good", [0, 1])
def test_no_trace_after_an_exception(good: int) -> None:
    """While the activity is measured, and in fine-tuning."""
    model = mixed_net()
    before = footprint(model)
    calls = iter(range(9))

    def train(epoch: int) -> Pairs:
        yield TRAIN[0]
        if next(calls) == good:
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        FinePruning(epochs=2).purify(model, DefenderData(train, lambda: iter(VALIDATION), CLASSES))
    assert footprint(model) == before


def test_an_exception_while_pruning_puts_the_weights_back() -> None:
    model = make_net()

    def fail(layer: nn.Module, _: tuple[Tensor, ...]) -> None:
        if int((layer.get_parameter("weight") == 0).all(0).sum()) == 2:
            raise RuntimeError("stop")

    handle = model.fc.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        FinePruning(max_drop=1.0, epochs=0).purify(model, make_data())
    handle.remove()
    assert same(model, make_net())


def test_runs_are_alike() -> None:
    first, second = make_net(), make_net()
    assert str(FinePruning(epochs=2).purify(first, make_data())) == str(
        FinePruning(epochs=2).purify(second, make_data())
    )
    assert same(first, second)


class Scaled(Net):
    """Does not end with its linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, CLASSES, 4), nn.Flatten()), "the model does not end with one"),
        (Scaled, "the model does not end with one"),
        (lambda: make_net().requires_grad_(False), "The last linear layer, `fc`, is frozen: set its `requires_grad`"),
    ],
)
def test_models_without_a_linear_classifier(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    start = copy.deepcopy(model)
    with pytest.raises(NotApplicableError, match=message):
        FinePruning().purify(model, make_data())
    assert same(model, start)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_training_images() -> None:
    with pytest.raises(MisconfigurationException, match="no training images: give the phase a larger split"):
        FinePruning().purify(make_net(), DefenderData(lambda epoch: iter(()), lambda: iter(VALIDATION), CLASSES))


def tiny_vit() -> nn.Module:
    model: nn.Module = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=CLASSES)
    return model


@pytest.mark.parametrize(
    ("make", "name", "channels"),
    [
        (lambda: backbones.resnet18(CLASSES, width=4), "fc", 32),
        (lambda: backbones.preact_resnet18(CLASSES, width=4), "fc", 32),
        (lambda: backbones.vgg11_bn(CLASSES, width=4), "fc", 32),
        (tiny_vit, "heads.head", 16),
    ],
)
def test_runs_on_other_networks(make: Callable[[], nn.Module], name: str, channels: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batch = torch.rand(4, 3, 16, 16), torch.arange(4) % CLASSES
    data = DefenderData(lambda epoch: iter([batch]), lambda: iter([batch]), CLASSES)
    report = FinePruning(max_drop=1.0, epochs=1).purify(model, data)
    assert sorted(report.tensors[name].tolist()) == list(range(channels))
    assert report.values["pruned"] == channels - 1
    assert (model.get_parameter(f"{name}.weight") != 0).any(0).sum() == 1


@pytest.mark.parametrize("build", [backbones.resnet18, backbones.preact_resnet18, backbones.vgg11_bn])
def test_a_column_is_a_channel_before_pooling(build: Callable[..., nn.Module]) -> None:
    """Pruning equals masking the last maps, also behind a residual sum."""
    torch.manual_seed(0)
    model = build(CLASSES, width=4).eval()
    images = torch.rand(4, 3, 32, 32)
    data = DefenderData(
        lambda _: iter([(images, torch.arange(4) % 3)]), lambda: iter([(images, torch.arange(4) % 3)]), CLASSES
    )
    pruned = copy.deepcopy(model)
    report = FinePruning(max_drop=1.0, epochs=0).purify(pruned, data)
    gone = report.tensors["fc"][:-1]
    last = model.get_submodule({"ResNet": "layer4", "PreActResNet": "bn", "VGG": "features"}[type(model).__name__])

    def mask(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(1, gone, 0)

    last.register_forward_hook(mask)
    assert torch.allclose(model(images), pruned(images), atol=1e-6)


def test_mixed_precision_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    FinePruning(epochs=1).purify(make_net(), make_data())
    assert capsys.readouterr().err == ""
    data = DefenderData(
        train_batches, lambda: iter(VALIDATION), CLASSES,
        forward_context=lambda: torch.autocast("cpu", torch.bfloat16), show_progress=True,
    )  # fmt: skip
    report = FinePruning(epochs=1).purify(make_net(), data)
    assert "fine-tuning the pruned model" in capsys.readouterr().err
    assert report.values["validation_accuracy"] > 0.5


@pytest.mark.parametrize("defense", [FinePruning(epochs=0), FinePruning(epochs=10, learning_rate=0.05)])
def test_the_backdoor_goes(attacked_small_cnn: Attacked, defense: FinePruning) -> None:
    model = attacked_small_cnn.model()
    defense.purify(model, attacked_small_cnn.data)
    attacked_small_cnn.check_removed(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FinePruning(max_drop=-0.1), "`max_drop` to be in [0, 1], but got -0.1."),
        (lambda: FinePruning(max_drop=1.1), "`max_drop` to be in [0, 1], but got 1.1."),
        (lambda: FinePruning(epochs=-1), "`epochs` to be a non-negative integer, but got -1."),
        (lambda: FinePruning(learning_rate=0.0), "`learning_rate` to be a positive float, but got 0.0."),
        (lambda: FinePruning(momentum=1.0), "`momentum` to be in [0, 1), but got 1.0."),
        (lambda: FinePruning(momentum=-0.1), "`momentum` to be in [0, 1), but got -0.1."),
        (lambda: FinePruning(weight_decay=-1.0), "`weight_decay` to be a non-negative float, but got -1.0."),
    ],
)
def test_refuses(make: Callable[[], FinePruning], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {re.escape(message)}"):
        make()
