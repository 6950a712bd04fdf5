"""Losses between and around networks, against networks that are built at those weights by hand."""

import copy
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from lightning_bd.backbones import small_cnn
from lightning_bd.functional.evaluation import evaluate
from lightning_bd.functional.loss_surface import (
    filter_normalized_directions,
    interpolate_weights,
    line,
    recalibrate_batch_norm,
    surface,
)

Batches = list[tuple[Tensor, Tensor]]


def make_net(seed: int = 0) -> nn.Sequential:
    """Weights and running statistics of their own; one layer in a mode of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
        )
        for parameter in net[1].parameters():
            nn.init.normal_(parameter, 1.0)
        for _ in range(seed + 1):
            net(torch.rand(8, 1, 6, 6))
    net[2].eval()
    return net


def make_batches(sizes: tuple[int, ...] = (8, 3), seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [module.training for module in model.modules()]


def assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], list[bool]]) -> None:
    state, modes = snapshot(model)
    assert modes == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def expected(model: nn.Module, weights: Mapping[str, Tensor], batches: Batches) -> tuple[float, float]:
    """Loss and accuracy of a copy with these weights, all images at once."""
    model = copy.deepcopy(model).eval()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = functional_call(model, dict(weights), (images,)).detach()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


class Explodes(Batches):
    """Batches of which the second raises."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield make_batches()[0]
        raise RuntimeError("no more")


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.5])
def test_interpolated_weights(t: float) -> None:
    first, second = make_net(0).state_dict(), make_net(1).state_dict()
    between = interpolate_weights(first, second, t)
    assert list(between) == list(first)
    for name, value in between.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - t) * first[name] + t * second[name])
            assert not torch.equal(first[name], second[name])
        # One batch seen by the first, two by the second.
        else:
            assert value == (1 if t < 0.5 else 2)
        assert value.data_ptr() not in (first[name].data_ptr(), second[name].data_ptr())
    if t in (0, 1):
        assert all(torch.equal(value, (first, second)[int(t)][name]) for name, value in between.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("1.bias"), "only the first has `1.bias`"),
        (lambda w: w.update(extra=torch.zeros(1)), "only the second has `extra`"),
        (lambda w: w.update({"5.bias": torch.zeros(4)}), r"`5.bias` has the shape \(3,\) in the first and \(4,\)"),
        (lambda w: w.update({"5.bias": w["5.bias"].double()}), "`5.bias` is torch.float32 in the first and .*float64"),
    ],
)
def test_other_architectures_are_refused(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    first, second = make_net().state_dict(), dict(make_net().state_dict())
    change(second)
    with pytest.raises(ValueError, match=f"Only weights of the same architecture can be interpolated, but {message}"):
        interpolate_weights(first, second, 0.5)


@pytest.mark.parametrize("t", [float("nan"), float("inf")])
def test_positions_are_finite(t: float) -> None:
    with pytest.raises(ValueError, match="Expected argument `t` to be a finite float, but got"):
        interpolate_weights({}, {}, t)


def test_recalibration_is_torchs_without_dropout() -> None:
    model, images = make_net(), [images for images, _ in make_batches((8, 8, 8), seed=5)]
    model[3] = nn.Identity()
    reference = copy.deepcopy(model)
    update_bn(images, reference)
    before = snapshot(model)
    assert recalibrate_batch_norm(model, images) == 1
    state, modes = snapshot(model)
    assert modes == before[1]
    assert model[1].momentum == 0.1
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value)
    assert not torch.equal(state["1.running_mean"], before[0]["1.running_mean"])


def test_recalibration_measures_without_dropout() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
    recalibrate_batch_norm(model, [torch.ones(100, 1)])
    state = model.state_dict()
    assert state["1.running_mean"] == 1
    assert state["1.running_var"] == 0


def test_recalibration_leaves_other_networks_alone() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, track_running_stats=False))
    assert recalibrate_batch_norm(model, (images for images, _ in Explodes())) == 0


def test_a_failed_recalibration_leaves_no_trace() -> None:
    model = make_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="`batches` to hold at least one batch of images, but got none"):
        recalibrate_batch_norm(model, [])
    with pytest.raises(RuntimeError, match="no more"):
        recalibrate_batch_norm(model, (images for images, _ in Explodes()))
    assert model[1].momentum == 0.1
    assert_untouched(model, before)


def test_line() -> None:
    model, first, second = make_net(2), make_net(0), make_net(1)
    data = {"clean": make_batches(), "poisoned": make_batches((4,), seed=1)}
    before, seen = snapshot(model), list[float]()
    for point in line(model, first.state_dict(), second.state_dict(), (0.0, 0.4, 1.0), data):
        assert_untouched(model, before)
        seen.append(point.position)
        weights = interpolate_weights(first.state_dict(), second.state_dict(), point.position)
        for name, batches in data.items():
            assert point.results[name] == pytest.approx(expected(model, weights, batches), rel=1e-5)
    assert seen == [0.0, 0.4, 1.0]


def test_line_with_recalibration() -> None:
    model, first, second = make_net(2), make_net(0), make_net(1)
    before = snapshot(model)
    data, images = {"clean": make_batches()}, [batch[0] for batch in make_batches((8, 8), seed=7)]
    [point] = line(model, first.state_dict(), second.state_dict(), [0.5], data, images)
    assert_untouched(model, before)
    reference = make_net()
    reference.load_state_dict(interpolate_weights(first.state_dict(), second.state_dict(), 0.5))
    uncured = evaluate(reference, data["clean"])
    recalibrate_batch_norm(reference, images)
    assert point.results["clean"] == evaluate(reference, data["clean"])
    assert point.results["clean"].loss != uncured.loss


def test_directions_have_the_norms_of_the_filters() -> None:
    model = small_cnn(3, in_channels=2, width=4)
    directions = filter_normalized_directions(model, torch.Generator().manual_seed(3))
    for direction in directions:
        assert list(direction) == [name for name, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            assert direction[name].shape == parameter.shape
            if parameter.ndim == 1:
                assert not direction[name].any()
                continue
            for noise, weight in zip(direction[name], parameter, strict=True):
                assert noise.norm().item() == pytest.approx(weight.norm().item(), rel=1e-5)
    weight = dict(model.named_parameters())["features.4.weight"]
    first, second = (direction["features.4.weight"].flatten() for direction in directions)
    assert abs(F.cosine_similarity(first, second, dim=0)) < 5 / weight.numel() ** 0.5
    # Independent of the weights' signs and of where they point.
    assert abs(F.cosine_similarity(first, weight.flatten(), dim=0)) < 5 / weight.numel() ** 0.5


def test_directions_depend_on_the_generator_alone() -> None:
    model = make_net()
    state = torch.get_rng_state()
    first, again, other = (filter_normalized_directions(model, torch.Generator().manual_seed(s))[0] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_directions_keep_the_dtype_and_dead_filters() -> None:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight[0] = 0
    direction, _ = filter_normalized_directions(model, torch.Generator().manual_seed(0))
    assert direction["weight"].dtype is torch.float64
    assert not direction["weight"][0].any()


def test_surface() -> None:
    model, alphas, betas = make_net(), (-1.0, 0.0, 0.5), (0.0, 2.0)
    data = {"clean": make_batches(), "poisoned": make_batches((4,), seed=1)}
    directions = filter_normalized_directions(model, torch.Generator().manual_seed(0))
    before, seen = snapshot(model), list[tuple[float, float]]()
    for point in surface(model, directions, alphas, betas, data):
        assert_untouched(model, before)
        seen.append((point.alpha, point.beta))
        weights = {
            name: p + point.alpha * directions[0][name] + point.beta * directions[1][name]
            for name, p in model.named_parameters()
        }
        for name, batches in data.items():
            assert point.results[name] == pytest.approx(expected(model, weights, batches), rel=1e-4)
        if point.alpha == point.beta == 0:
            assert point.results["clean"] == evaluate(model, data["clean"])
    assert seen == [(alpha, beta) for alpha in alphas for beta in betas]
    assert_untouched(model, before)


def test_an_exception_leaves_the_weights() -> None:
    model = make_net()
    directions = filter_normalized_directions(model, torch.Generator().manual_seed(0))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no more"):
        next(surface(model, directions, [1.0], [1.0], {"clean": Explodes()}))
    assert_untouched(model, before)
    with pytest.raises(RuntimeError, match="no more"):
        next(line(model, make_net(1).state_dict(), make_net(2).state_dict(), [0.5], {"clean": Explodes()}))
    assert_untouched(model, before)


def test_directions_of_another_network_are_refused() -> None:
    model, data = make_net(), {"clean": make_batches()}
    first, second = filter_normalized_directions(model, torch.Generator())
    lacking = {name: value for name, value in first.items() if name != "5.bias"}
    with pytest.raises(ValueError, match=r"name the parameters of the model, but they lack `5.bias`"):
        next(surface(model, (lacking, second), [0.0], [0.0], data))
    with pytest.raises(ValueError, match="but the model has no `other`"):
        next(surface(model, (first, second | {"other": torch.zeros(1)}), [0.0], [0.0], data))
