"""What all backbones promise: shapes, stages, gradients, initialisation, formats of memory and numbers."""

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd import backbones

# Narrow copies keep the tests fast.
NARROW: dict[str, dict[str, int]] = {
    "small_cnn": {"width": 8},
    "resnet18": {"width": 8},
    "resnet20": {"width": 8},
    "resnet34": {"width": 8},
    "preact_resnet18": {"width": 8},
    "preact_resnet34": {"width": 8},
    "vgg11_bn": {"width": 8},
    "vgg16_bn": {"width": 8},
    "wide_resnet": {"depth": 16, "width_factor": 1},
}
STAGES = {"small_cnn": 0, "resnet20": 3, "wide_resnet": 3, "vgg11_bn": 0, "vgg16_bn": 0}
every_backbone = pytest.mark.parametrize("name", NARROW)


def build(name: str, num_classes: int = 10, **arguments: int) -> nn.Module:
    torch.manual_seed(0)
    function: Callable[..., nn.Module] = getattr(backbones, name)
    return function(num_classes, **{**NARROW[name], **arguments})


def test_no_backbone_goes_untested() -> None:
    assert set(backbones.__all__) == set(NARROW)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet20", 269_722),
        # Against the ResNets above: no normalisation in the three projections (128 + 256 + 512 channels); that of the
        # stem (64) stands after the last stage (512); three blocks normalise half as many channels first, before the
        # convolution instead of after it. Each channel has a weight and a bias.
        ("preact_resnet18", 11_173_962 - 2 * 896 + 2 * (512 - 64) - 2 * (64 + 128 + 256)),
        ("preact_resnet34", 21_282_122 - 2 * 896 + 2 * (512 - 64) - 2 * (64 + 128 + 256)),
        ("wide_resnet", 36_479_194),
    ],
)
def test_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = getattr(backbones, name)(num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@every_backbone
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (3, 19, 28)])
def test_logits_have_one_column_for_each_class(name: str, channels: int, height: int, width: int) -> None:
    model = build(name, num_classes=7, in_channels=channels).eval()
    logits = model(torch.rand(2, channels, height, width))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_small_cnn_takes_images_of_four_pixels() -> None:
    assert build("small_cnn")(torch.rand(2, 3, 4, 4)).shape == (2, 10)


@every_backbone
def test_stages_are_reached_by_name_and_halve_the_size(name: str) -> None:
    model = build(name).eval()
    stages = STAGES.get(name, 4)
    found = [child for child, _ in model.named_children() if re.fullmatch(r"layer\d", child)]
    assert found == [f"layer{number}" for number in range(1, stages + 1)]
    sizes: list[int] = []
    for child in found:
        model.get_submodule(child).register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[-1]))
    model(torch.rand(2, 3, 16, 16))
    assert sizes == [16, 8, 4, 2][:stages]


@every_backbone
def test_the_last_linear_layer_makes_the_logits_from_features(name: str) -> None:
    model = build(name).eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    last.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0], output)))
    logits = model(torch.rand(2, 3, 16, 16))
    assert torch.equal(seen[1], logits)
    assert seen[0].shape == (2, last.in_features)


@every_backbone
def test_every_parameter_gets_a_gradient(name: str) -> None:
    # In evaluation mode: in training mode the biases before a normalisation have none.
    model = build(name).eval()
    torch.autograd.backward(F.cross_entropy(model(torch.rand(2, 3, 32, 32)), torch.tensor([1, 2])))
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@every_backbone
def test_outputs_of_layers_are_not_overwritten(name: str) -> None:
    # Per-sample gradients need the outputs as the layers made them, and hooks on these tensors.
    model = build(name)
    outputs: dict[str, Tensor] = {}
    hooked: set[str] = set()

    def keep(key: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[key] = output
            output.register_hook(lambda _gradient: hooked.add(key))  # type: ignore[no-untyped-call]

        return hook

    for key, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, _BatchNorm)):
            module.register_forward_hook(keep(key))
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert hooked == set(outputs)
    # PyTorch counts the in-place operations on a tensor.
    assert [key for key, output in outputs.items() if output._version != 0] == []


@every_backbone
def test_state_dict_carries_the_whole_model(name: str) -> None:
    model, images = build(name), torch.rand(4, 3, 16, 16)
    model(images)  # moves the running statistics
    model.eval()
    torch.manual_seed(1)
    other = getattr(backbones, name)(10, **NARROW[name]).eval()
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


@every_backbone
def test_convolutions_start_as_in_he_et_al(name: str) -> None:
    model = build(name, **({"width_factor": 4} if name == "wide_resnet" else {"width": 32}))
    tested = 0
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        assert module.bias is None or not module.bias.any()
        if module.weight.numel() > 9_000:
            # The deviation of n normal numbers is off by about 1 / sqrt(2 n): 0.8 % here.
            expected = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.04)
            tested += 1
    assert tested > 0


@every_backbone
def test_channels_last_gives_the_same_logits(name: str) -> None:
    model = build(name).eval()
    images = torch.rand(2, 3, 16, 16)
    expected = model(images)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    actual = other(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_backbone
def test_bfloat16_autocast_stays_close(name: str) -> None:
    model = build(name)
    images = torch.rand(4, 3, 16, 16)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    # bfloat16 has 8 bits: some per cent after tens of layers.
    assert (logits.float() - expected).norm() < 0.15 * expected.norm()
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["small_cnn", "resnet20", "preact_resnet18", "vgg11_bn", "wide_resnet"])
def test_compiles_into_one_graph(name: str) -> None:
    model = build(name).eval()
    images = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@every_backbone
def test_config_builds_the_backbone(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=nn.Module)
    config = {"class_path": f"lightning_bd.backbones.{name}", "init_args": {"num_classes": 7, **NARROW[name]}}
    parsed = parser.parse_object({"backbone": config})
    assert parsed.backbone.class_path == config["class_path"]
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    model = instantiate(parsed).backbone
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


@every_backbone
@pytest.mark.parametrize("value", [0, -3, 2.5])
def test_sizes_that_are_not_positive_integers_are_refused(name: str, value: float) -> None:
    arguments = ["num_classes", "in_channels", "width_factor" if name == "wide_resnet" else "width"]
    for argument in arguments:
        message = f"Expected argument `{argument}` to be a positive integer, but got {value}."
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(backbones, name)(**{"num_classes": 10, argument: value})


@pytest.mark.parametrize("depth", [4, 20, 27, 0, -2])
def test_wide_resnet_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"Expected argument `depth` to be 6 n \+ 4 .* but got {depth}\."):
        backbones.wide_resnet(10, depth=depth)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_wide_resnet_refuses_other_dropout(dropout: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected argument `dropout` .* in \[0, 1\), but got {dropout}\."):
        backbones.wide_resnet(10, dropout=dropout)


def test_wide_resnet_drops_activations_in_training_only() -> None:
    images = torch.rand(2, 3, 8, 8)
    model = backbones.wide_resnet(10, depth=10, width_factor=1, dropout=0.5)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_small_cnn_learns_the_digits() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    train, test = order[:1400], order[1400:]
    model = backbones.small_cnn(num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        for batch in torch.split(train[torch.randperm(len(train))], 64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(images[batch]), labels[batch]))
            optimizer.step()
    model.eval()
    accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()
    assert accuracy > 0.95
