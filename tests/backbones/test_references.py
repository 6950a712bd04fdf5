"""Backbones against networks that others wrote, or that the test writes from the paper."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_bd.backbones import preact_resnet18, resnet18, resnet20, resnet34, vgg11_bn, vgg16_bn, wide_resnet

Backbone = Callable[..., nn.Module]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(resnet18, torchvision.models.resnet18), (resnet34, torchvision.models.resnet34)],
)
def test_resnets_equal_torchvision_with_a_small_stem(ours: Backbone, theirs: Backbone) -> None:
    torch.manual_seed(0)
    reference: nn.Module = theirs(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    assert_equal_after_loading(ours(10), reference)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(vgg11_bn, torchvision.models.vgg11_bn), (vgg16_bn, torchvision.models.vgg16_bn)],
)
def test_vggs_equal_the_features_of_torchvision_and_one_linear_layer(ours: Backbone, theirs: Backbone) -> None:
    with torch.device("meta"):
        features = theirs(init_weights=False).get_submodule("features")
    torch.manual_seed(0)
    features = features.to_empty(device="cpu")
    for module in features.children():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
    reference = nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), fc=nn.Linear(512, 10)))
    assert_equal_after_loading(ours(10), reference, size=32)


def test_resnet20_equals_the_paper_s_option_a() -> None:
    model = resnet20(10).eval()
    move_statistics(model)
    images = torch.rand(2, 3, 16, 16)
    weights = model.state_dict()

    def convolve(x: Tensor, number: str, prefix: str, stride: int) -> Tensor:
        return normalise(
            weights, F.conv2d(x, weights[f"{prefix}conv{number}.weight"], None, stride, 1), f"{prefix}bn{number}"
        )

    x = convolve(images, "1", "", 1).relu()
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            stride = 2 if stage > 1 and block == 0 else 1
            prefix = f"layer{stage}.{block}."
            out = convolve(convolve(x, "1", prefix, stride).relu(), "2", prefix, 1)
            if stride == 2:
                x = x[:, :, ::2, ::2]
                x = torch.cat([x, torch.zeros_like(x)], dim=1)
            x = (out + x).relu()
    expected = x.mean(dim=(2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "depth"), [(preact_resnet18(10, width=8), 2), (wide_resnet(10, depth=16, width_factor=2), 2)]
)
def test_preactivation_networks_equal_the_paper_s_equations(model: nn.Module, depth: int) -> None:
    model.eval()
    move_statistics(model)
    images = torch.rand(2, 3, 16, 16)
    weights = model.state_dict()
    x = F.conv2d(images, weights["conv1.weight"], padding=1)
    stages = sum(name.startswith("layer") for name, _ in model.named_children())
    for stage in range(1, stages + 1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}."
            stride = 2 if stage > 1 and block == 0 else 1
            active = normalise(weights, x, f"{prefix}bn1").relu()
            out = F.conv2d(active, weights[f"{prefix}conv1.weight"], None, stride, 1)
            out = F.conv2d(normalise(weights, out, f"{prefix}bn2").relu(), weights[f"{prefix}conv2.weight"], None, 1, 1)
            # The first block of a stage splits after its activation, the others before.
            shortcut = active if block == 0 else x
            if f"{prefix}downsample.weight" in weights:
                shortcut = F.conv2d(shortcut, weights[f"{prefix}downsample.weight"], None, stride)
            x = out + shortcut
    features = normalise(weights, x, "bn").relu().mean(dim=(2, 3))
    expected = features @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def normalise(weights: dict[str, Tensor], x: Tensor, prefix: str) -> Tensor:
    """Apply ``(x - mean) / sqrt(var + 1e-5) * weight + bias`` for each channel."""
    mean, var, weight, bias = (
        weights[f"{prefix}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def move_statistics(model: nn.Module) -> None:
    """Make the normalisations differ from the identity and from each other."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


def assert_equal_after_loading(model: nn.Module, reference: nn.Module, size: int = 16) -> None:
    """Load the reference's weights, by name and none left over, and compare the logits in both modes."""
    move_statistics(reference)
    model.load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, size, size)
    for training in (False, True):
        model.train(training)
        reference.train(training)
        with torch.no_grad():
            torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-4)
