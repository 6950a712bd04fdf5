"""Losses between and around networks, against networks that are built at those weights by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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

if TYPE_CHECKING:
    from tests.functional.conftest import Toys


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.5])
def test_interpolated_weights(toys: Toys, t: float) -> None:
    first, second = toys.net(0).state_dict(), toys.net(1).state_dict()
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
def test_other_architectures_are_refused(
    toys: Toys, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    first, second = toys.net().state_dict(), dict(toys.net().state_dict())
    change(second)
    with pytest.raises(ValueError, match=f"Only weights of the same architecture can be interpolated, but {message}"):
        interpolate_weights(first, second, 0.5)


@pytest.mark.parametrize("t", [float("nan"), float("inf")])
def test_positions_are_finite(t: float) -> None:
    with pytest.raises(ValueError, match="Expected argument `t` to be a finite float, but got"):
        interpolate_weights({}, {}, t)


def test_recalibration_is_torchs_without_dropout(toys: Toys) -> None:
    model, images = toys.net(), [images for images, _ in toys.batches((8, 8, 8), seed=5)]
    model[3] = nn.Identity()
    reference = copy.deepcopy(model)
    update_bn(images, reference)
    before = toys.snapshot(model)
    assert recalibrate_batch_norm(model, images) == 1
    state, modes = toys.snapshot(model)
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


def test_recalibration_leaves_other_networks_alone(toys: Toys) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, track_running_stats=False))
    assert recalibrate_batch_norm(model, (images for images, _ in toys.exploding())) == 0


def test_a_failed_recalibration_leaves_no_trace(toys: Toys) -> None:
    model = toys.net()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match="`batches` to hold at least one batch of images, but got none"):
        recalibrate_batch_norm(model, [])
    with pytest.raises(RuntimeError, match="no more"):
        recalibrate_batch_norm(model, (images for images, _ in toys.exploding()))
    assert model[1].momentum == 0.1
    toys.assert_untouched(model, before)


def test_line(toys: Toys) -> None:
    model, first, second = toys.net(2), toys.net(0), toys.net(1)
    data = {"clean": toys.batches(), "poisoned": toys.batches((4,), seed=1)}
    before, seen = toys.snapshot(model), list[float]()
    for point in line(model, first.state_dict(), second.state_dict(), (0.0, 0.4, 1.0), data):
        toys.assert_untouched(model, before)
        seen.append(point.position)
        weights = interpolate_weights(first.state_dict(), second.state_dict(), point.position)
        for name, batches in data.items():
            assert point.results[name] == pytest.approx(toys.expected(model, weights, batches), rel=1e-5)
    assert seen == [0.0, 0.4, 1.0]


def test_line_with_recalibration(toys: Toys) -> None:
    model, first, second = toys.net(2), toys.net(0), toys.net(1)
    before = toys.snapshot(model)
    data, images = {"clean": toys.batches()}, [batch[0] for batch in toys.batches((8, 8), seed=7)]
    [point] = line(model, first.state_dict(), second.state_dict(), [0.5], data, images)
    toys.assert_untouched(model, before)
    reference = toys.net()
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


def test_directions_depend_on_the_generator_alone(toys: Toys) -> None:
    model = toys.net()
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


def test_surface(toys: Toys) -> None:
    model, alphas, betas = toys.net(), (-1.0, 0.0, 0.5), (0.0, 2.0)
    data = {"clean": toys.batches(), "poisoned": toys.batches((4,), seed=1)}
    directions = filter_normalized_directions(model, torch.Generator().manual_seed(0))
    before, seen = toys.snapshot(model), list[tuple[float, float]]()
    for point in surface(model, directions, alphas, betas, data):
        toys.assert_untouched(model, before)
        seen.append((point.alpha, point.beta))
        weights = {
            name: p + point.alpha * directions[0][name] + point.beta * directions[1][name]
            for name, p in model.named_parameters()
        }
        for name, batches in data.items():
            assert point.results[name] == pytest.approx(toys.expected(model, weights, batches), rel=1e-4)
        if point.alpha == point.beta == 0:
            assert point.results["clean"] == evaluate(model, data["clean"])
    assert seen == [(alpha, beta) for alpha in alphas for beta in betas]
    toys.assert_untouched(model, before)


def test_an_exception_leaves_the_weights(toys: Toys) -> None:
    model = toys.net()
    directions = filter_normalized_directions(model, torch.Generator().manual_seed(0))
    before = toys.snapshot(model)
    with pytest.raises(RuntimeError, match="no more"):
        next(surface(model, directions, [1.0], [1.0], {"clean": toys.exploding()}))
    toys.assert_untouched(model, before)
    with pytest.raises(RuntimeError, match="no more"):
        next(line(model, toys.net(1).state_dict(), toys.net(2).state_dict(), [0.5], {"clean": toys.exploding()}))
    toys.assert_untouched(model, before)


def test_directions_of_another_network_are_refused(toys: Toys) -> None:
    model, data = toys.net(), {"clean": toys.batches()}
    first, second = filter_normalized_directions(model, torch.Generator())
    lacking = {name: value for name, value in first.items() if name != "5.bias"}
    with pytest.raises(ValueError, match=r"name the parameters of the model, but they lack `5.bias`"):
        next(surface(model, (lacking, second), [0.0], [0.0], data))
    with pytest.raises(ValueError, match="but the model has no `other`"):
        next(surface(model, (first, second | {"other": torch.zeros(1)}), [0.0], [0.0], data))
