"""Measures of a detector's scores against scikit-learn, brute force and numbers worked out by hand."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_bd.functional.detection import (
    average_precision,
    detection_metrics,
    fpr_at_tpr,
    rank_auroc,
    tpr_at_fpr,
)

Side = Literal["out", "in"]
SIDES: tuple[Side, ...] = ("out", "in")
FUNCTIONS: tuple[Callable[[Tensor, Tensor], Tensor | dict[str, Tensor]], ...] = (
    rank_auroc,
    average_precision,
    fpr_at_tpr,
    tpr_at_fpr,
    detection_metrics,
)
CASES = ("continuous", "heavy_ties", "binary_scores", "constant", "separated", "reversed", "few_suspicious", "tiny")


def images(case: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores in float64 and marks of a detector that is somewhat better than chance, unless the case says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    count, share = (1201, 0.4) if case != "few_suspicious" else (2000, 0.01)
    if case == "tiny":
        return torch.tensor([0.3, 0.1, 0.7], dtype=torch.float64), torch.tensor([True, False, False])
    positives = torch.rand(count, generator=generator) < share
    scores = torch.randn(count, generator=generator, dtype=torch.float64) + positives
    if case == "heavy_ties":
        scores = scores.round()
    elif case == "binary_scores":
        scores = (scores > 0.5).double()
    elif case == "constant":
        scores = torch.full_like(scores, 3.0)
    elif case == "separated":
        scores = scores + 100 * positives
    elif case == "reversed":
        scores = scores - 100 * positives.double()
    return scores, positives


def rates(scores: Tensor, positives: Tensor, positive: Side) -> list[tuple[float, float]]:
    """True and false positive rate at every threshold, flagging nothing included, by counting image after image."""
    found = positives if positive == "out" else ~positives
    points = [(0.0, 0.0)]
    for threshold in set(scores.tolist()):
        chosen = scores >= threshold if positive == "out" else scores <= threshold
        points.append(
            (int((chosen & found).sum()) / int(found.sum()), int((chosen & ~found).sum()) / int((~found).sum()))
        )
    return points


@pytest.mark.parametrize("case", CASES)
def test_areas_equal_scikit_learn(case: str) -> None:
    scores, positives = images(case)
    assert rank_auroc(scores, positives).item() == pytest.approx(roc_auc_score(positives, scores), abs=1e-7)
    for side, marks, sign in (("out", positives, 1), ("in", ~positives, -1)):
        expected = average_precision_score(marks, sign * scores)
        value = average_precision(scores, positives, positive="out" if side == "out" else "in")
        assert value.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("level", [0.005, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_false_positive_rate_equals_scikit_learns_curve(case: str, side: Side, level: float) -> None:
    scores, positives = images(case)
    marks, signed = (positives, scores) if side == "out" else (~positives, -scores)
    fpr, tpr, _ = roc_curve(marks, signed, drop_intermediate=False)
    expected = fpr[np.flatnonzero(tpr >= level)[0]]
    assert fpr_at_tpr(scores, positives, tpr=level, positive=side).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", [0.0, 0.001, 0.01, 0.1, 0.5, 0.99])
def test_true_positive_rate_equals_scikit_learns_curve(case: str, level: float) -> None:
    scores, positives = images(case)
    fpr, tpr, _ = roc_curve(positives, scores, drop_intermediate=False)
    assert tpr_at_fpr(scores, positives, fpr=level).item() == pytest.approx(tpr[fpr <= level].max(), abs=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_rates_equal_brute_force_over_all_thresholds(seed: int) -> None:
    scores, positives = (tensor[: 40 + seed] for tensor in images("heavy_ties" if seed % 2 else "continuous", seed))
    for side in SIDES:
        points = rates(scores, positives, side)
        for level in (0.5, 0.95, 1.0):
            expected = min(fpr for tpr, fpr in points if tpr >= level)
            assert fpr_at_tpr(scores, positives, tpr=level, positive=side).item() == pytest.approx(expected, abs=1e-7)
    for level in (0.0, 0.05, 0.5):
        expected = max(tpr for tpr, fpr in rates(scores, positives, "out") if fpr <= level)
        assert tpr_at_fpr(scores, positives, fpr=level).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_the_share_of_ordered_pairs(seed: int) -> None:
    scores, positives = (tensor[:100] for tensor in images("heavy_ties", seed))
    differences = scores[positives][:, None] - scores[~positives][None, :]
    pairs = (differences > 0).double() + 0.5 * (differences == 0).double()
    assert rank_auroc(scores, positives).item() == pytest.approx(pairs.mean().item(), abs=1e-7)


def test_the_two_conventions_of_fpr95_differ() -> None:
    # 20 inconspicuous images and 20 suspicious ones. 19 of each are 95 %.
    # "out": the lowest of the suspicious images may be missed: from 10 up, all but two inconspicuous are below: 2 / 20.
    # "in": the highest of the inconspicuous images may be missed: up to 11.5, three suspicious are accepted: 3 / 20.
    inconspicuous = torch.cat([torch.arange(18) / 2, torch.tensor([11.5, 50.0])])
    suspicious = torch.cat([torch.tensor([-1.0, 10.0, 11.0]), torch.arange(12, 29)])
    scores = torch.cat([inconspicuous, suspicious])
    positives = torch.arange(40) >= 20
    assert fpr_at_tpr(scores, positives).item() == pytest.approx(2 / 20)
    assert fpr_at_tpr(scores, positives, positive="in").item() == pytest.approx(3 / 20)
    # The level itself is reached by 19 of 20; a hair more asks for all.
    assert fpr_at_tpr(scores, positives, tpr=0.9501).item() == 1.0


def test_exactly_the_allowed_share_of_false_positives() -> None:
    # 1 of 100 is 1 %: the second highest inconspicuous image, at 8, is the first too many.
    scores = torch.cat([torch.zeros(98), torch.tensor([8.0, 9.0]), torch.tensor([7.0, 8.0, 8.5, 9.5])])
    positives = torch.arange(104) >= 100
    assert tpr_at_fpr(scores, positives, fpr=0.01).item() == 0.5
    assert tpr_at_fpr(scores, positives, fpr=0.0099).item() == 0.25


def test_constant_scores_say_nothing() -> None:
    values = detection_metrics(torch.full((8,), -2.0), torch.arange(8) < 2)
    assert {name: value.item() for name, value in values.items()} == {
        "auroc": 0.5,
        "aupr_out": 0.25,
        "aupr_in": 0.75,
        "fpr95_out": 1.0,
        "fpr95_in": 1.0,
        "tpr_at_fpr1": 0.0,
    }


def test_large_logits_are_told_apart() -> None:
    # A sigmoid in float32 is 1 from about 17 on.
    scores, positives = images("continuous")
    scores = (100 + 10 * scores).float()
    expected = roc_auc_score(positives, scores)
    assert 0.7 < expected < 0.9
    assert rank_auroc(scores, positives).item() == pytest.approx(expected, abs=1e-7)
    assert binary_auroc(scores, positives.long()).item() == pytest.approx(0.5)


def test_neighbouring_numbers_are_told_apart() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    scores = torch.stack([one, torch.nextafter(one, 2 * one)])
    assert rank_auroc(scores, torch.tensor([False, True])).item() == 1.0
    assert rank_auroc(scores, torch.tensor([True, False])).item() == 0.0
    # The two zeros are one number.
    assert rank_auroc(torch.tensor([-0.0, 0.0]), torch.tensor([False, True])).item() == 0.5


@pytest.mark.parametrize("case", ["continuous", "heavy_ties"])
def test_infinite_scores_are_the_largest_and_the_smallest(case: str) -> None:
    scores, positives = images(case)
    infinite, large = scores.clone(), scores.clone()
    for value in (math.inf, -math.inf):
        ends = scores * math.copysign(1.0, value) > 1.5
        infinite[ends], large[ends] = value, math.copysign(1e6, value)
    assert int(infinite.isinf().sum()) > 100
    assert detection_metrics(infinite, positives) == detection_metrics(large, positives)


def test_only_the_order_of_the_scores_counts() -> None:
    scores, positives = images("continuous")
    values = detection_metrics(scores, positives)
    assert detection_metrics(scores.exp(), positives) == values
    assert detection_metrics(1e200 * (scores - 50), positives) == values


@pytest.mark.parametrize("case", ["continuous", "heavy_ties", "binary_scores"])
def test_the_order_of_the_images_does_not_count(case: str) -> None:
    scores, positives = images(case)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    assert detection_metrics(scores[order], positives[order]) == detection_metrics(scores, positives)


def test_swapping_the_sides_swaps_the_measures() -> None:
    scores, positives = images("heavy_ties")
    values, swapped = detection_metrics(scores, positives), detection_metrics(-scores, ~positives)
    assert values["aupr_out"] != values["aupr_in"]
    assert values["fpr95_out"] != values["fpr95_in"]
    assert swapped["aupr_out"] == values["aupr_in"]
    assert swapped["fpr95_in"] == values["fpr95_out"]
    assert swapped["auroc"] == values["auroc"]


def test_the_dictionary_holds_the_measures_under_their_names() -> None:
    scores, positives = images("continuous")
    assert detection_metrics(scores, positives) == {
        "auroc": rank_auroc(scores, positives),
        "aupr_out": average_precision(scores, positives),
        "aupr_in": average_precision(scores, positives, positive="in"),
        "fpr95_out": fpr_at_tpr(scores, positives),
        "fpr95_in": fpr_at_tpr(scores, positives, positive="in"),
        "tpr_at_fpr1": tpr_at_fpr(scores, positives),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_and_a_graph(dtype: torch.dtype) -> None:
    # Rounded scores are exact in every format.
    scores, positives = images("heavy_ties")
    expected = detection_metrics(scores, positives)
    values = detection_metrics(scores.to(dtype).requires_grad_(), positives)
    assert values == expected
    for value in values.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert not value.requires_grad


def test_inputs_are_left_alone() -> None:
    scores, positives = images("continuous")
    before = scores.clone(), positives.clone()
    detection_metrics(scores, positives)
    assert torch.equal(scores, before[0])
    assert torch.equal(positives, before[1])


def test_counts_beyond_float32() -> None:
    # 5000 * 5000 pairs exceed float32's integers: one pair less than all of them must show in float64.
    scores = torch.arange(10_000, dtype=torch.float64)
    positives = scores >= 5000
    scores[4999], scores[5000] = 5000.0, 4999.0
    torch.set_default_dtype(torch.float64)
    try:
        assert rank_auroc(scores, positives).item() == 1 - 1 / 25_000_000
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_same() -> None:
    scores, positives = images("heavy_ties")
    values = detection_metrics(scores.cuda(), positives.cuda())
    assert all(value.is_cuda for value in values.values())
    assert {name: value.cpu() for name, value in values.items()} == detection_metrics(scores, positives)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_scores_are_refused(function: Callable[[Tensor, Tensor], Tensor | dict[str, Tensor]]) -> None:
    scores, positives = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([True, False, True])
    with pytest.raises(ValueError, match=r"`scores` to be floating point of shape \(N,\), but got torch\.int64 of"):
        function(scores.long(), positives)
    with pytest.raises(ValueError, match=r"`scores` to be floating point .* of shape \(3, 1\)"):
        function(scores[:, None], positives[:, None])
    with pytest.raises(ValueError, match=r"`positives` to be torch\.bool of shape \(3,\), but got torch\.int64 of"):
        function(scores, positives.long())
    with pytest.raises(ValueError, match=r"`positives` to be torch\.bool of shape \(3,\), but got .* \(2,\)"):
        function(scores, positives[:2])
    with pytest.raises(ValueError, match=r"at least one image, but got none"):
        function(scores[:0], positives[:0])
    with pytest.raises(ValueError, match=r"Expected argument `scores` to hold no NaN, but got 2 of 3"):
        function(torch.tensor([math.nan, 0.2, math.nan]), positives)
    with pytest.raises(ValueError, match=r"Expected both suspicious and .* images, but got only suspicious ones"):
        function(scores, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"Expected both suspicious and .* images, but got only inconspicuous ones"):
        function(scores, torch.zeros(3, dtype=torch.bool))


def test_bad_levels_and_sides_are_refused() -> None:
    scores, positives = torch.tensor([0.1, 0.2]), torch.tensor([False, True])
    for tpr in (0.0, -0.5, 1.01, math.nan):
        with pytest.raises(ValueError, match=rf"Expected argument `tpr` to be a rate in \(0, 1\], but got {tpr}"):
            fpr_at_tpr(scores, positives, tpr=tpr)
    for fpr in (-0.01, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"Expected argument `fpr` to be a rate in \[0, 1\), but got {fpr}"):
            tpr_at_fpr(scores, positives, fpr=fpr)
    with pytest.raises(ValueError, match=r"Expected argument `positive` to be \"out\" or \"in\", but got 'id'"):
        average_precision(scores, positives, positive="id")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected argument `positive` to be \"out\" or \"in\", but got 'ood'"):
        fpr_at_tpr(scores, positives, positive="ood")  # type: ignore[arg-type]
