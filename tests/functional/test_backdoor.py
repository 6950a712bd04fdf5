"""Rates of triggered images, the rating of a defense and the interval of a rate."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from lightning_bd.functional.backdoor import (
    attack_success_rate,
    attack_success_rate_all,
    count_matches,
    defense_effectiveness_rating,
    robust_accuracy,
    wilson_interval,
)

Rate = Callable[[Tensor, Tensor, Tensor], Tensor]
RATES: tuple[Rate, ...] = (attack_success_rate, attack_success_rate_all, robust_accuracy)


def brute_force(rate: Rate, preds: Tensor, target: Tensor, original: Tensor) -> float:
    hits, images = 0, 0
    for pred, wanted, true in zip(preds.tolist(), target.tolist(), original.tolist(), strict=True):
        if wanted == true and rate is not attack_success_rate_all:
            continue
        images += 1
        hits += pred == (true if rate is robust_accuracy else wanted)
    return hits / images


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("mapping", ["all_to_one", "all_to_all", "random"])
def test_rates_equal_a_loop_over_the_images(rate: Rate, mapping: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 5, generator=generator)
    original = torch.randint(5, (300,), generator=generator)
    target = {
        "all_to_one": torch.full((300,), 2),
        "all_to_all": (original + 1) % 5,
        "random": torch.randint(5, (300,), generator=generator),
    }[mapping]
    labels = torch.from_numpy(np.argmax(logits.numpy(), axis=1))
    expected = brute_force(rate, labels, target, original)
    assert 0.0 < expected < 1.0
    for preds in (logits, labels, labels.to(torch.int32)):
        assert rate(preds, target, original).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    # One-hot rows scaled by 8 are exact in both formats.
    labels = torch.tensor([0, 1, 2, 0])
    logits = 8 * torch.nn.functional.one_hot(labels, 3).to(dtype)
    target, original = torch.tensor([0, 1, 0, 0]), torch.tensor([1, 0, 2, 0])
    assert attack_success_rate(logits, target, original).item() == pytest.approx(2 / 3)
    assert robust_accuracy(logits, target, original).item() == pytest.approx(1 / 3)


def test_all_images_of_the_target_class_give_nan_without_a_warning() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attack_success_rate(labels, labels, labels).isnan()
        assert robust_accuracy(labels, labels, labels).isnan()
    assert attack_success_rate_all(labels, labels, labels).item() == 1.0


@pytest.mark.parametrize("rate", RATES)
def test_no_values_are_read_from_the_device(rate: Rate) -> None:
    # Tensors on the meta device have no values: `.item()` and selections by a mask raise there.
    labels = torch.zeros(4, dtype=torch.long, device="meta")
    assert rate(torch.zeros(4, 3, device="meta"), labels, labels).shape == ()


def test_counts_are_integers() -> None:
    labels = torch.tensor([0, 1])
    for count in count_matches(labels, labels, labels.flip(0)):
        assert count.dtype == torch.int64


@pytest.mark.parametrize("shape", [(2, 3, 4), (), (4, 2)])
def test_predictions_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Expected argument `preds` .* but got torch.int64 of shape"):
        attack_success_rate(torch.zeros(shape, dtype=torch.long), labels, labels)


def test_labels_that_are_not_integers_are_refused() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Expected argument `preds` .* but got torch.float32 of shape \(4,\)"):
        attack_success_rate(labels.float(), labels, labels)
    with pytest.raises(ValueError, match=r"`target` and `original` .* but got torch.float32 of shape \(4,\)"):
        attack_success_rate(labels, labels.float(), labels)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("size", [1, 3])
def test_labels_of_another_number_of_images_are_refused(rate: Rate, size: int) -> None:
    labels, others = torch.zeros(4, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    message = rf"integer labels of shape \(4,\), but got torch.int64 of shape \({size},\)"
    with pytest.raises(ValueError, match=message):
        rate(labels, others, labels)
    with pytest.raises(ValueError, match=message):
        rate(labels, labels, others)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((0.9, 0.9, 1.0, 0.0), 1.0),  # (1 - 0 + 1) / 2
        ((0.9, 0.9, 1.0, 1.0), 0.5),  # (0 - 0 + 1) / 2
        ((1.0, 0.0, 0.0, 1.0), 0.0),  # (0 - 1 + 1) / 2: more attack success is not punished
        ((0.9, 0.95, 0.8, 0.2), 0.8),  # (0.6 - 0 + 1) / 2: more accuracy is not rewarded
        ((0.9, 0.8, 0.8, 0.2), 0.75),  # (0.6 - 0.1 + 1) / 2
    ],
)
def test_defense_effectiveness_rating(rates: tuple[float, float, float, float], expected: float) -> None:
    assert defense_effectiveness_rating(*rates) == pytest.approx(expected)


@pytest.mark.parametrize("value", [-0.1, 93.0, math.nan])
@pytest.mark.parametrize(
    "name",
    ["clean_accuracy_before", "clean_accuracy_after", "attack_success_rate_before", "attack_success_rate_after"],
)
def test_defense_effectiveness_rating_refuses_what_is_no_rate(name: str, value: float) -> None:
    rates = {
        "clean_accuracy_before": 0.9,
        "clean_accuracy_after": 0.9,
        "attack_success_rate_before": 0.9,
        "attack_success_rate_after": 0.9,
    }
    rates[name] = value
    with pytest.raises(ValueError, match=rf"Expected argument `{name}` to be a rate in \[0, 1\], but got {value}"):
        defense_effectiveness_rating(**rates)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "total"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (8_731, 9_000)])
def test_wilson_interval_equals_scipy(successes: int, total: int, confidence: float) -> None:
    expected = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(successes, total, confidence)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert 0.0 <= low <= successes / total <= high <= 1.0


@pytest.mark.parametrize(
    ("successes", "total", "confidence", "message"),
    [
        (0, 0, 0.95, "`total` to be a positive integer, but got 0"),
        (-1, 5, 0.95, r"`successes` to be in \[0, 5\], but got -1"),
        (6, 5, 0.95, r"`successes` to be in \[0, 5\], but got 6"),
        (1, 5, 95.0, r"`confidence` to be in \(0, 1\), but got 95.0"),
        (1, 5, 0.0, r"`confidence` to be in \(0, 1\), but got 0.0"),
    ],
)
def test_wilson_interval_refuses_impossible_counts(successes: int, total: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, total, confidence)
