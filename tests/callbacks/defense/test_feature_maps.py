"""Feature maps are found in networks of many kinds, by what a forward pass does."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import Bottleneck, ResNet

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import NotApplicableError
from lightning_bd.callbacks.defense.feature_maps import find_feature_maps, named_feature_maps


class Plain(nn.Module):
    """Two convolutions; the activation after both is a function or one module."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.act = act
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu if self.act is None else self.act
        logits: Tensor = self.fc(act(self.second(act(self.first(x)))).mean(dim=(2, 3)))
        return logits


class Wrapped(nn.Module):
    """A normalisation first, then a network whose first convolution halves the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm2d(3, affine=False)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.normalize(x))
        return logits


def tiny_vit(depth: int = 5) -> nn.Module:
    model: nn.Module = VisionTransformer(8, 4, depth, 2, 16, 32, num_classes=10)
    return model


@pytest.mark.parametrize(
    ("make", "size", "layers", "shapes"),
    [
        (lambda: backbones.resnet18(10, width=4), 32, ["layer2", "layer3", "layer4"], [(8, 16), (16, 8), (32, 4)]),
        (lambda: backbones.preact_resnet18(10, width=4), 32, ["layer2", "layer3", "layer4"],
         [(8, 16), (16, 8), (32, 4)]),
        (lambda: backbones.resnet20(10), 16, ["layer1", "layer2", "layer3"], [(16, 16), (32, 8), (64, 4)]),
        # The activations before the last poolings; after the fifth there is a single position.
        (lambda: backbones.vgg11_bn(10, width=4), 32, ["features.13", "features.20", "features.27"],
         [(16, 8), (32, 4), (32, 2)]),
        (lambda: backbones.small_cnn(10), 8, ["features.2", "features"], [(32, 8), (64, 4)]),
        # Its blocks narrow before they shrink: at each resolution the next stage's first block has maps too.
        (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10), 64, ["layer2", "layer3", "layer4"],
         [(512, 8), (1024, 4), (2048, 2)]),
        (lambda: DenseNet(4, (1, 1, 1), 8, num_classes=10), 32,
         ["features.denseblock1", "features.denseblock2", "features"], [(12, 8), (10, 4), (9, 2)]),
        # In its blocks the channels are last.
        (lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=10), 32,
         ["features.1", "features"], [(8, 8), (16, 4)]),
        (Plain, 8, ["first", "second"], [(4, 8), (6, 4)]),
        (lambda: Plain(nn.ReLU()), 8, ["act", "act"], [(4, 8), (6, 4)]),
        (Wrapped, 8, ["net.1"], [(4, 4)]),
        # A pooling adds nothing to the map before it.
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 10)),
         8, ["1"], [(4, 8)]),
    ],
)  # fmt: skip
def test_finds_the_last_map_of_each_stage(
    make: Callable[[], nn.Module], size: int, layers: list[str], shapes: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    model = make()
    images = torch.rand(2, 3, size, size)
    model(images)  # Lazy layers.
    maps = find_feature_maps(model, images, 3)
    assert maps.layers == tuple(layers)
    logits, features = maps.read(model, images)
    assert [tuple(tensor.shape) for tensor in features] == [(2, width, side, side) for width, side in shapes]
    assert logits.shape == (2, 10)


def test_a_module_that_runs_twice_gives_the_right_call() -> None:
    torch.manual_seed(0)
    model, images = Plain(nn.ReLU()), torch.rand(2, 3, 8, 8)
    maps = find_feature_maps(model, images, 1)
    assert maps.layers == ("act",)
    _, (features,) = maps.read(model, images)
    assert torch.equal(features, F.relu(model.second(F.relu(model.first(images)))))
    assert named_feature_maps(model, images, ["act"]) == maps


@pytest.mark.parametrize(("count", "chosen"), [(1, [4]), (2, [2, 4]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_a_transformers_blocks_are_evenly_spaced(count: int, chosen: list[int]) -> None:
    model, images = tiny_vit(), torch.rand(2, 3, 8, 8)
    maps = find_feature_maps(model, images, count)
    assert maps.layers == tuple(f"encoder.layers.encoder_layer_{number}" for number in chosen)
    _, features = maps.read(model, images)
    assert all(tensor.shape == (2, 5, 16) for tensor in features)


def test_the_count() -> None:
    model, images = backbones.resnet18(10, width=4), torch.rand(2, 3, 16, 16)
    assert find_feature_maps(model, images, 1).layers == ("layer4",)
    assert find_feature_maps(model, images, 9).layers == ("layer1", "layer2", "layer3", "layer4")


def test_frozen_stages_are_left_out() -> None:
    model, images = backbones.resnet18(10, width=4), torch.rand(2, 3, 16, 16)
    for name in ("conv1", "bn1", "layer1", "layer2"):
        model.get_submodule(name).requires_grad_(False)
    assert find_feature_maps(model, images, 4).layers == ("layer3", "layer4")


def test_images_that_are_not_square() -> None:
    model, images = backbones.resnet18(10, width=4), torch.rand(1, 3, 17, 30)
    maps = find_feature_maps(model, images, 3)
    assert maps.layers == ("layer2", "layer3", "layer4")
    assert [tuple(tensor.shape[2:]) for tensor in maps.read(model, images)[1]] == [(9, 15), (5, 8), (3, 4)]


def test_leaves_no_trace() -> None:
    model, images = backbones.resnet18(10, width=4), torch.rand(2, 3, 16, 16)
    model.get_submodule("layer2").eval()
    before = copy.deepcopy(model.state_dict())
    maps = find_feature_maps(model, images, 3)
    model.eval()
    maps.read(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        find_feature_maps(model, torch.rand(2, 5, 16, 16), 3)
    assert not any(module._forward_hooks for module in model.modules())


def test_modes_are_put_back() -> None:
    model = backbones.resnet18(10, width=4)
    model.get_submodule("layer2").eval()
    modes = [module.training for module in model.modules()]
    find_feature_maps(model, torch.rand(2, 3, 16, 16), 3)
    assert [module.training for module in model.modules()] == modes


def test_a_compiled_network_is_read_too() -> None:
    torch.manual_seed(0)
    model, images = Plain(), torch.rand(2, 3, 8, 8)
    expected = find_feature_maps(model, images, 3)
    features = expected.read(model, images)[1]
    model.compile(backend="eager")
    model(images)
    assert find_feature_maps(model, images, 3) == expected
    found = expected.read(model, images)[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, features, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10)),
        nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10)),
        backbones.small_cnn(10).requires_grad_(False),
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)),
    ],
)
def test_nothing_to_compare(model: nn.Module) -> None:
    with pytest.raises(NotApplicableError, match=r"needs feature maps \(B, C, H, W\).* name them in `layers`"):
        find_feature_maps(model, torch.rand(2, 3, 8, 8), 3)


def test_named_layers() -> None:
    model, images = backbones.resnet18(10, width=4), torch.rand(2, 3, 16, 16)
    maps = named_feature_maps(model, images, ["layer3", "conv1"])
    assert maps.layers == ("layer3", "conv1")
    assert [tensor.shape[1] for tensor in maps.read(model, images)[1]] == [16, 4]
    assert named_feature_maps(tiny_vit(), torch.rand(1, 3, 8, 8), ["encoder.ln"]).layers == ("encoder.ln",)


@pytest.mark.parametrize(
    ("name", "close"),
    [("layer2", "0.layer2"), ("0.layer22", "0.layer2"), ("quite another", "0, 0.conv1, 0.bn1")],
)
def test_an_unknown_layer(name: str, close: str) -> None:
    model = nn.Sequential(backbones.resnet18(10, width=4))
    with pytest.raises(MisconfigurationException, match=rf"Change `{name}` in `layers`.* Close: {re.escape(close)}"):
        named_feature_maps(model, torch.rand(1, 3, 8, 8), ["0.layer1", name])


@pytest.mark.parametrize(("name", "shape"), [("fc", "(2, 10)"), ("flat", "(2, 1, 10)"), ("one", "(2, 2, 1, 1)")])
def test_a_layer_without_positions(name: str, shape: str) -> None:
    model = nn.Sequential()
    model.add_module("one", nn.Conv2d(3, 2, 8))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(2, 10))
    model.add_module("flat", nn.Unflatten(1, (1, 10)))
    model.add_module("end", nn.Flatten())
    with pytest.raises(NotApplicableError, match=rf"layer `{name}` must be .* but is {re.escape(shape)}"):
        named_feature_maps(model, torch.rand(2, 3, 8, 8), [name])


def test_a_layer_that_gives_no_tensor() -> None:
    model = Plain()
    model.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(NotApplicableError, match=r"layer `unused` must be .* but is no tensor"):
        named_feature_maps(model, torch.rand(1, 3, 8, 8), ["unused"])
