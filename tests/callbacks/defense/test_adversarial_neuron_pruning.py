"""Adversarial neuron pruning against masks learned with a forward pass written by hand, and brute force."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Protocol

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd import backbones
from lightning_bd.callbacks.defense.adversarial_neuron_pruning import AdversarialNeuronPruning
from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError
from lightning_bd.callbacks.defense.pruning import silence
from lightning_bd.functional.draws import keyed_generator

CLASSES = 3
THRESHOLDS = [step / 20 for step in range(20)]
Pairs = Iterator[tuple[Tensor, Tensor]]
Forward = Callable[[nn.Module, Tensor, dict[str, Tensor], dict[str, Tensor]], Tensor]


class Attacked(Protocol):
    """What the fixtures give."""

    data: DefenderData
    trained: nn.Module

    def model(self) -> nn.Module: ...

    def rates(self, model: nn.Module) -> tuple[float, float]: ...

    def check_removed(self, model: nn.Module) -> tuple[float, float]: ...


def make_batches(sizes: Sequence[int], seed: int, wrong: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """Noisy 4x4 pictures of three patterns, a share of them with a wrong label."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    batches = []
    for size in sizes:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        images = patterns[labels] + 0.3 * torch.randn(size, 1, 4, 4, generator=generator)
        mistaken = torch.rand(size, generator=generator) < wrong
        batches.append((images, torch.where(mistaken, (labels + 1) % CLASSES, labels)))
    return batches


# With wrong labels a confident network is punished, so that masks shrink: some to 0, others hardly.
TRAIN, VALIDATION = make_batches((16, 16, 9), 0, wrong=0.4), make_batches((64, 36), 1)


def make_data(epoch_limit: int | None = None) -> DefenderData:
    def train(epoch: int) -> Pairs:
        """Each epoch has an order of its own, so that a wrong epoch number shows."""
        return iter([*TRAIN[epoch % 3 :], *TRAIN[: epoch % 3]])

    return DefenderData(train, lambda: iter(VALIDATION), CLASSES, epoch_limit)


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        for images, labels in make_batches((16, 16, 9), 2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@cache
def _normalized_net() -> nn.Module:
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 8),
            nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES),
        )
    )  # fmt: skip


@cache
def _plain_net() -> nn.Module:
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8, bias=False), nn.ReLU(), nn.Linear(8, CLASSES)
        )
    )


def normalized_net() -> nn.Module:
    """A convolution and a linear layer with batch normalisation, and a dropout."""
    return copy.deepcopy(_normalized_net())


def plain_net() -> nn.Module:
    """Two layers without batch normalisation, one of them without bias, and the classifier."""
    return copy.deepcopy(_plain_net())


def normalized_forward(model: nn.Module, x: Tensor, weight: dict[str, Tensor], bias: dict[str, Tensor]) -> Tensor:
    """The equations of `normalized_net` with relative changes of weights and biases, in batch statistics."""
    p = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def normalize(x: Tensor, name: str, dims: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        mean = x.mean(dims, keepdim=True)
        deviation = (((x - mean) ** 2).mean(dims, keepdim=True) + 1e-5).sqrt()
        scale, shift = p[f"{name}.weight"] * weight[name], p[f"{name}.bias"] * bias[name]
        return (x - mean) / deviation * scale.view(shape) + shift.view(shape)

    x = F.conv2d(x, p["0.weight"], p["0.bias"])
    x = normalize(x, "1", (0, 2, 3), (1, 6, 1, 1)).clamp(min=0).flatten(1)
    x = x @ p["5.weight"].T + p["5.bias"]
    return normalize(x, "6", (0,), (1, 8)).clamp(min=0) @ p["8.weight"].T + p["8.bias"]


def plain_forward(model: nn.Module, x: Tensor, weight: dict[str, Tensor], bias: dict[str, Tensor]) -> Tensor:
    """The equations of `plain_net` with relative changes per filter and row."""
    p = {name: tensor.detach() for name, tensor in model.named_parameters()}
    x = F.conv2d(x, p["0.weight"] * weight["0"][:, None, None, None], p["0.bias"] * bias["0"]).clamp(min=0)
    x = (x.flatten(1) @ (p["3.weight"] * weight["3"][:, None]).T).clamp(min=0)
    return x @ p["5.weight"].T + p["5.bias"]


def masks_by_hand(
    model: nn.Module, forward: Forward, sizes: dict[str, int], biased: set[str], iterations: int,
    strength: float = 0.4, tradeoff: float = 0.2, rate: float = 0.2, momentum: float = 0.9, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """The min-max problem from its equations, with SGD written out."""
    generator = keyed_generator(seed, "adversarial neuron pruning")
    masks = {name: torch.ones(size) for name, size in sizes.items()}
    velocity = {name: torch.zeros(size) for name, size in sizes.items()}
    ones = {name: torch.ones(size) for name, size in sizes.items()}
    for iteration in range(iterations):
        epoch, number = divmod(iteration, len(TRAIN))
        images, labels = list(make_data().train(epoch))[number]
        d, e = {}, {name: torch.zeros(size) for name, size in sizes.items()}
        for name, size in sizes.items():
            d[name] = strength * (2 * torch.rand(size, generator=generator) - 1)
            if name in biased:
                e[name] = strength * (2 * torch.rand(size, generator=generator) - 1)
        free = [t.requires_grad_() for changes in (d, e) for t in changes.values()]
        loss = F.cross_entropy(
            forward(model, images, {n: masks[n] + d[n] for n in d}, {n: 1 + e[n] for n in e}), labels
        )
        gradients = torch.autograd.grad(loss, free, materialize_grads=True)
        worst = [
            (t + strength * g.sign()).clamp(-strength, strength).detach() for t, g in zip(free, gradients, strict=True)
        ]
        d, e = dict(zip(d, worst[: len(d)], strict=True)), dict(zip(e, worst[len(d) :], strict=True))
        for mask in masks.values():
            mask.requires_grad_()
        clean = F.cross_entropy(forward(model, images, masks, ones), labels)
        robust = F.cross_entropy(
            forward(model, images, {n: masks[n] + d[n] for n in d}, {n: 1 + e[n] for n in e}), labels
        )
        gradients = torch.autograd.grad(tradeoff * clean + (1 - tradeoff) * robust, list(masks.values()))
        for name, gradient in zip(masks, gradients, strict=True):
            velocity[name] = momentum * velocity[name] + gradient
            masks[name] = (masks[name].detach() - rate * velocity[name]).clamp(0, 1)
    return masks


def accuracy(model: nn.Module) -> float:
    model = copy.deepcopy(model).eval()
    return float(torch.cat([model(images).argmax(1) == labels for images, labels in VALIDATION]).float().mean())


def pruned_by_hand(model: nn.Module, masks: dict[str, Tensor], threshold: float) -> nn.Module:
    """Weights zero where the mask is below the threshold, biases as they are."""
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        for channel, value in enumerate(mask.tolist()):
            if value < threshold:
                model.get_parameter(f"{name}.weight").data[channel] = 0
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.0}, {"strength": 1.0, "tradeoff": 0.7}, {"rate": 0.05, "momentum": 0.5}, {"seed": 4}],
)
def test_masks_equal_the_equations(options: dict[str, float]) -> None:
    model = normalized_net()
    expected = masks_by_hand(model, normalized_forward, {"1": 6, "6": 8}, {"1", "6"}, 8, **options)  # type: ignore[arg-type]
    defense = AdversarialNeuronPruning(
        strength=options.get("strength", 0.4),
        tradeoff=options.get("tradeoff", 0.2),
        learning_rate=options.get("rate", 0.2),
        momentum=options.get("momentum", 0.9),
        iterations=8,
        seed=int(options.get("seed", 0)),
    )
    report = defense.purify(model, make_data())
    assert list(report.tensors) == ["1", "6"]
    assert any(bool((mask < 0.9).any()) for mask in expected.values())
    for name, mask in expected.items():
        assert torch.allclose(report.tensors[name], mask, atol=1e-4), name
    assert report.epochs == 3


def test_layers_with_a_second_name() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normalized_net()
            self.norm, self.head = self.net.get_submodule("1"), self.net.get_submodule("8")

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits

    model, plain = Aliased(), normalized_net()
    before = list(model.parameters())
    first, second = (AdversarialNeuronPruning(iterations=4).purify(each, make_data()) for each in (model, plain))
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert [f"net.{name}" for name in second.tensors] == list(first.tensors)
    assert all(torch.equal(first.tensors[f"net.{name}"], mask) for name, mask in second.tensors.items())
    assert same(model.net, plain)


def test_without_normalisation_filters_and_rows_are_masked() -> None:
    model = plain_net()
    expected = masks_by_hand(model, plain_forward, {"0": 6, "3": 8}, {"0"}, 5)
    report = AdversarialNeuronPruning(iterations=5, threshold=0.6).purify(model, make_data())
    assert list(report.tensors) == ["0", "3"]
    for name, mask in expected.items():
        assert torch.allclose(report.tensors[name], mask, atol=1e-4), name
    assert report.values["pruned"] > 0
    assert same(model, pruned_by_hand(plain_net(), report.tensors, 0.6))


@pytest.mark.parametrize("max_drop", [0.0, 0.01, 0.1, 1.0])
def test_the_threshold_equals_brute_force(max_drop: float) -> None:
    model = normalized_net()
    before = accuracy(model)
    report = AdversarialNeuronPruning(iterations=5, max_drop=max_drop).purify(model, make_data())
    drops = {t: before - accuracy(pruned_by_hand(normalized_net(), report.tensors, t)) for t in THRESHOLDS}
    assert len({round(drop, 6) for drop in drops.values()}) > 3
    chosen = max(t for t, drop in drops.items() if drop <= max_drop + 1e-6)
    expected = pruned_by_hand(normalized_net(), report.tensors, chosen)
    count = sum(int((mask < chosen).sum()) for mask in report.tensors.values())
    assert report.values["threshold"] == chosen
    assert report.values["pruned"] == count
    assert report.values["validation_accuracy_before"] == pytest.approx(before)
    assert report.values["validation_accuracy"] == pytest.approx(accuracy(expected))
    assert report.note == f"{count} of 14 neurons pruned, masks below {chosen:g}"
    assert same(model, expected)


def test_the_largest_threshold_is_taken_also_behind_a_worse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def scripted(model: nn.Module, data: DefenderData) -> float:
        gone = sum(int((model.get_parameter(f"{name}.weight") == 0).sum()) for name in ("1", "6"))
        return 0.9 if gone == 0 or 4 <= gone <= 6 else 0.5

    monkeypatch.setattr("lightning_bd.callbacks.defense.adversarial_neuron_pruning.clean_accuracy", scripted)
    report = AdversarialNeuronPruning(iterations=5).purify(normalized_net(), make_data())
    counts = [sum(int((mask < t).sum()) for mask in report.tensors.values()) for t in THRESHOLDS]
    assert any(0 < count < 4 for count in counts)
    assert report.values["threshold"] == max(t for t, n in zip(THRESHOLDS, counts, strict=True) if 4 <= n <= 6)


def test_a_given_threshold_is_taken_whatever_it_costs() -> None:
    model = normalized_net()
    report = AdversarialNeuronPruning(iterations=8, threshold=1.0, max_drop=0.0).purify(model, make_data())
    assert report.values["validation_accuracy"] < report.values["validation_accuracy_before"] - 0.1
    assert report.values["threshold"] == 1.0
    assert same(model, pruned_by_hand(normalized_net(), report.tensors, 1.0))
    assert any(bool((mask == 1).any()) for mask in report.tensors.values())


def test_an_exception_while_choosing_puts_the_weights_back() -> None:
    passes: list[int] = []

    def validation() -> Pairs:
        passes.append(0)
        if len(passes) == 4:
            raise RuntimeError("the disk is gone")
        return iter(VALIDATION)

    model = normalized_net()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        AdversarialNeuronPruning(iterations=30).purify(model, DefenderData(make_data().train, validation, CLASSES))
    assert same(model, normalized_net())


def test_nothing_is_pruned_below_zero() -> None:
    model = normalized_net()
    report = AdversarialNeuronPruning(iterations=30, threshold=0.0).purify(model, make_data())
    assert same(model, normalized_net())
    assert report.values["pruned"] == 0
    assert report.values["validation_accuracy"] == report.values["validation_accuracy_before"]


@pytest.mark.parametrize(
    ("iterations", "limit", "epochs", "passes"), [(7, None, 3, 7), (7, 2, 2, 6), (6, 9, 2, 6), (1, None, 1, 1)]
)
def test_iterations_and_the_runs_cap(iterations: int, limit: int | None, epochs: int, passes: int) -> None:
    seen = []

    def train(epoch: int) -> Pairs:
        for batch in make_data().train(epoch):
            seen.append(epoch)
            yield batch

    data = DefenderData(train, lambda: iter(VALIDATION), CLASSES, limit)
    report = AdversarialNeuronPruning(iterations=iterations, threshold=0.0).purify(normalized_net(), data)
    assert (report.epochs, len(seen)) == (epochs, passes)
    assert seen == [number // len(TRAIN) for number in range(passes)]


def test_stages_go_from_nothing_to_a_high_threshold() -> None:
    report = AdversarialNeuronPruning(iterations=20).purify(normalized_net(), make_data())
    defense, model = AdversarialNeuronPruning(), normalized_net()
    positions = []
    for position in defense.stages(model, report):
        assert same(model, pruned_by_hand(normalized_net(), report.tensors, position))
        positions.append(position)
    assert positions == THRESHOLDS
    assert defense.stage_axis == "mask threshold"


def footprint(model: nn.Module) -> list[object]:
    """All that a defense may not leave behind, but for weights."""
    return [
        [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [getattr(module, "track_running_stats", None) for module in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        {name: tensor.tolist() for name, tensor in model.named_buffers()},
        torch.get_rng_state().tolist(),
    ]


def mixed_net() -> nn.Module:
    """Part of the network in training mode, part of it frozen."""
    model = normalized_net().train()
    model.get_submodule("6").eval()
    model.get_submodule("5").requires_grad_(False)
    return model


def test_no_trace() -> None:
    model = mixed_net()
    before = footprint(model)
    AdversarialNeuronPruning(iterations=5).purify(model, make_data())
    assert footprint(model) == before


def test_no_trace_after_an_exception() -> None:
    model = mixed_net()
    before = footprint(model)

    def train(epoch: int) -> Pairs:
        yield TRAIN[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        AdversarialNeuronPruning(iterations=5).purify(model, DefenderData(train, lambda: iter(VALIDATION), CLASSES))
    assert footprint(model) == before
    assert same(model, mixed_net())


def test_the_same_seed_gives_the_same_masks() -> None:
    def masks(seed: int) -> Tensor:
        torch.rand(seed + 1)
        report = AdversarialNeuronPruning(iterations=6, seed=seed).purify(normalized_net(), make_data())
        return torch.cat(list(report.tensors.values()))

    assert torch.equal(masks(0), masks(0))
    assert not torch.equal(masks(0), masks(1))


def test_frozen_layers_are_left_alone() -> None:
    model = normalized_net()
    model.get_submodule("1").requires_grad_(False)
    report = AdversarialNeuronPruning(iterations=8, threshold=1.0).purify(model, make_data())
    assert list(report.tensors) == ["6"]
    assert same(model.get_submodule("1"), normalized_net().get_submodule("1"))
    assert not model.get_parameter("1.weight").requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), "needs batch normalisation with affine"),
        (lambda: normalized_net().requires_grad_(False), "frozen: set `requires_grad` of some weights"),
        (lambda: plain_net().requires_grad_(False), "frozen: set `requires_grad` of some weights"),
    ],
)
def test_models_without_neurons(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    start = copy.deepcopy(model)
    with pytest.raises(NotApplicableError, match=message):
        AdversarialNeuronPruning().purify(model, make_data())
    assert same(model, start)


def test_normalisation_without_weights_does_not_count() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, CLASSES))
    report = AdversarialNeuronPruning(iterations=2).purify(model, make_data())
    assert list(report.tensors) == ["1"]


def tiny_vit() -> nn.Module:
    model: nn.Module = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=CLASSES)
    nn.init.normal_(model.get_parameter("heads.head.weight"))  # zero, it would pass no gradient on
    return model


@pytest.mark.parametrize(
    ("make", "neurons"),
    [
        (lambda: backbones.resnet18(CLASSES, width=4), 300),
        (lambda: backbones.preact_resnet18(CLASSES, width=4), 244),
        (lambda: backbones.vgg11_bn(CLASSES, width=4), 172),
        (tiny_vit, 16 + 2 * (32 + 16)),
    ],
)
def test_runs_on_other_networks(make: Callable[[], nn.Module], neurons: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batch = torch.rand(4, 3, 16, 16), torch.arange(4) % CLASSES
    data = DefenderData(lambda epoch: iter([batch]), lambda: iter([batch]), CLASSES)
    report = AdversarialNeuronPruning(iterations=2, threshold=0.999).purify(model, data)
    assert sum(len(mask) for mask in report.tensors.values()) == neurons
    assert report.values["pruned"] > 0


def test_mixed_precision_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    exact = AdversarialNeuronPruning(iterations=3).purify(normalized_net(), make_data())
    assert capsys.readouterr().err == ""
    data = DefenderData(
        make_data().train, lambda: iter(VALIDATION), CLASSES,
        forward_context=lambda: torch.autocast("cpu", torch.bfloat16), show_progress=True,
    )  # fmt: skip
    mixed = AdversarialNeuronPruning(iterations=3).purify(normalized_net(), data)
    assert "learning masks" in capsys.readouterr().err
    assert any(not torch.equal(mixed.tensors[name], mask) for name, mask in exact.tensors.items())
    for name, mask in exact.tensors.items():
        assert (mixed.tensors[name] - mask).abs().mean() < 0.1


def test_the_backdoor_goes(attacked_resnet: Attacked) -> None:
    model = attacked_resnet.model()
    AdversarialNeuronPruning(iterations=30).purify(model, attacked_resnet.data)
    attacked_resnet.check_removed(model)


@pytest.mark.parametrize("keep_bias", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, 3), (2, 2, 5, 5)),
        (nn.Conv2d(2, 3, 3, bias=False), (2, 2, 5, 5)),
        (nn.Linear(2, 3), (4, 2)),
        (nn.BatchNorm2d(3), (4, 3, 2, 2)),
    ],
)
def test_silenced_channels_are_constant(layer: nn.Module, shape: tuple[int, ...], keep_bias: bool) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, 1, 2)  # type: ignore[arg-type]
    x = torch.randn(shape)
    before, bias = layer(x), layer.bias
    silence(layer, torch.tensor([0, 2]), keep_bias=keep_bias)
    after = layer(x)
    assert torch.equal(after[:, 1], before[:, 1])
    for channel in (0, 2):
        expected = bias[channel].item() if keep_bias and isinstance(bias, Tensor) else 0.0
        assert (after[:, channel] == expected).all()
    silence(layer, [])
    assert torch.equal(after, layer(x))


@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.BatchNorm2d(3, affine=False), nn.ReLU()])
def test_layers_that_cannot_be_silenced(layer: nn.Module) -> None:
    with pytest.raises(NotApplicableError, match=f"Channels of {type(layer).__name__} cannot be silenced"):
        silence(layer, [0])


def test_silencing_a_channel_that_is_not_there() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        silence(nn.BatchNorm1d(3), [3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdversarialNeuronPruning(strength=-0.1), "`strength` to be a non-negative float, but got -0.1."),
        (lambda: AdversarialNeuronPruning(tradeoff=1.1), "`tradeoff` to be in [0, 1], but got 1.1."),
        (lambda: AdversarialNeuronPruning(tradeoff=-0.1), "`tradeoff` to be in [0, 1], but got -0.1."),
        (lambda: AdversarialNeuronPruning(learning_rate=0.0), "`learning_rate` to be a positive float, but got 0.0."),
        (lambda: AdversarialNeuronPruning(momentum=1.0), "`momentum` to be in [0, 1), but got 1.0."),
        (lambda: AdversarialNeuronPruning(momentum=-0.1), "`momentum` to be in [0, 1), but got -0.1."),
        (lambda: AdversarialNeuronPruning(iterations=0), "`iterations` to be a positive integer, but got 0."),
        (lambda: AdversarialNeuronPruning(threshold=1.1), "`threshold` to be in [0, 1] or None, but got 1.1."),
        (lambda: AdversarialNeuronPruning(threshold=-0.1), "`threshold` to be in [0, 1] or None, but got -0.1."),
        (lambda: AdversarialNeuronPruning(max_drop=-0.1), "`max_drop` to be in [0, 1], but got -0.1."),
        (lambda: AdversarialNeuronPruning(max_drop=1.1), "`max_drop` to be in [0, 1], but got 1.1."),
    ],
)
def test_refuses(make: Callable[[], AdversarialNeuronPruning], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {re.escape(message)}"):
        make()
