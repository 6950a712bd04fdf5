"""The detection metrics as torchmetrics: accumulation, reset, merging, pickling, collections, synchronisation."""

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import Tensor
from torchmetrics import MetricCollection

import lightning_bd
from lightning_bd.functional.detection import (
    average_precision,
    detection_metrics,
    fpr_at_tpr,
    rank_auroc,
    tpr_at_fpr,
)
from lightning_bd.metrics.detection import (
    DetectionAUROC,
    DetectionAveragePrecision,
    DetectionMetrics,
    FalsePositiveRate,
    TruePositiveRate,
)

Value = Tensor | dict[str, Tensor]
Single = DetectionAUROC | DetectionAveragePrecision | FalsePositiveRate | TruePositiveRate
Metric = Single | DetectionMetrics
Function = Callable[[Tensor, Tensor], Value]
SINGLES: dict[str, tuple[Callable[[], Single], Callable[[Tensor, Tensor], Tensor]]] = {
    "auroc": (DetectionAUROC, rank_auroc),
    "aupr_out": (DetectionAveragePrecision, average_precision),
    "aupr_in": (partial(DetectionAveragePrecision, positive="in"), partial(average_precision, positive="in")),
    "fpr95_out": (FalsePositiveRate, fpr_at_tpr),
    "fpr80_in": (partial(FalsePositiveRate, tpr=0.8, positive="in"), partial(fpr_at_tpr, tpr=0.8, positive="in")),
    "tpr_at_fpr1": (TruePositiveRate, tpr_at_fpr),
    "tpr_at_fpr20": (partial(TruePositiveRate, fpr=0.2), partial(tpr_at_fpr, fpr=0.2)),
}
PAIRS: tuple[tuple[Callable[[], Metric], Function], ...] = (*SINGLES.values(), (DetectionMetrics, detection_metrics))


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    positives = torch.rand(200, generator=generator) < 0.4
    return (4 * torch.randn(200, generator=generator) + 3 * positives).round() + 90, positives


def test_the_settings_of_the_pairs_give_different_numbers(images: tuple[Tensor, Tensor]) -> None:
    values = [function(*images).item() for _, function in SINGLES.values()]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
@pytest.mark.parametrize("sizes", [[200], [1, 0, 60, 139]])
def test_batches_of_any_size_give_the_value_of_all_images(
    metric_class: Callable[[], Metric], function: Function, sizes: list[int], images: tuple[Tensor, Tensor]
) -> None:
    metric = metric_class()
    for scores, positives in zip(*(torch.split(tensor, sizes) for tensor in images), strict=True):
        metric.update(scores, positives)
    assert metric.compute() == function(*images)


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_forward_gives_the_value_of_the_batch(
    metric_class: Callable[[], Metric], function: Function, images: tuple[Tensor, Tensor]
) -> None:
    metric = metric_class()
    for batch in zip(*(torch.split(tensor, 100) for tensor in images), strict=True):
        assert metric(*batch) == function(*batch)
    assert metric.compute() == function(*images)


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_the_order_of_the_batches_does_not_count(
    metric_class: Callable[[], Metric], function: Function, images: tuple[Tensor, Tensor]
) -> None:
    metric = metric_class()
    for batch in reversed(list(zip(*(torch.split(tensor, 30) for tensor in images), strict=True))):
        metric.update(*batch)
    assert metric.compute() == function(*images)


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_reset_forgets(metric_class: Callable[[], Metric], function: Function, images: tuple[Tensor, Tensor]) -> None:
    metric = metric_class()
    metric.update(images[0], ~images[1])
    metric.reset()
    metric.update(*images)
    assert metric.compute() == function(*images)


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_merged_and_copied_metrics_go_on(
    metric_class: Callable[[], Metric], function: Function, images: tuple[Tensor, Tensor]
) -> None:
    first, second = metric_class(), metric_class()
    first.update(*(tensor[:30] for tensor in images))
    second.update(*(tensor[30:] for tensor in images))
    for copied in (pickle.loads(pickle.dumps(first)), deepcopy(first)):  # what was just written
        copied.merge_state(second)
        assert copied.compute() == function(*images)
    # The original did not get the copies' images.
    assert first.compute() == function(*(tensor[:30] for tensor in images))


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_a_persistent_state_travels_in_the_state_dict(
    metric_class: Callable[[], Metric], function: Function, images: tuple[Tensor, Tensor]
) -> None:
    metric, loaded = metric_class(), metric_class()
    assert not metric.state_dict()
    for each in (metric, loaded):
        each.persistent(True)
    metric.update(*(tensor[:30] for tensor in images))
    loaded.load_state_dict(metric.state_dict())
    loaded.update(*(tensor[30:] for tensor in images))
    assert loaded.compute() == function(*images)


@pytest.mark.parametrize("compute_groups", [True, False])
def test_a_collection_gives_each_metric_its_value(compute_groups: bool, images: tuple[Tensor, Tensor]) -> None:
    # With groups the metrics share one state: they hold the same after the same updates.
    members: dict[str, torchmetrics.Metric | MetricCollection] = {"all": DetectionMetrics()}
    members |= {f"one_{name}": metric_class() for name, (metric_class, _) in SINGLES.items()}
    metrics = MetricCollection(members, compute_groups=compute_groups)
    for _ in range(2):
        for batch in zip(*(torch.split(tensor, 30) for tensor in images), strict=True):
            metrics.update(*batch)
        assert len(metrics.compute_groups) == (1 if compute_groups else 0)
        expected = detection_metrics(*images)
        expected |= {f"one_{name}": function(*images) for name, (_, function) in SINGLES.items()}
        assert metrics.compute() == expected
        metrics.reset()


def test_a_collection_keeps_a_metric_with_earlier_images_apart(images: tuple[Tensor, Tensor]) -> None:
    earlier, fresh = DetectionAUROC(), DetectionAveragePrecision()
    first, second = (tuple(tensor[part] for tensor in images) for part in (slice(30), slice(30, None)))
    earlier.update(*first)
    metrics = MetricCollection({"auroc": earlier, "aupr": fresh})
    metrics.update(*second)
    metrics.update(*second)
    scores, positives = (torch.cat(parts) for parts in zip(first, second, second, strict=True))
    assert metrics.compute() == {
        "auroc": rank_auroc(scores, positives),
        "aupr": average_precision(scores[30:], positives[30:]),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_kept_without_loss(dtype: torch.dtype) -> None:
    close = torch.tensor(1.0, dtype=dtype)
    scores = torch.stack([close, close + torch.finfo(dtype).eps]).requires_grad_()
    metric = DetectionAUROC()
    metric.update(scores, torch.tensor([False, True]))
    assert metric.compute().item() == 1.0
    # A graph that is kept would keep the model's activations.
    assert not metric.scores[0].requires_grad


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_bad_updates_are_refused(metric_class: Callable[[], Metric], function: Function) -> None:
    metric, scores = metric_class(), torch.zeros(4)
    with pytest.raises(ValueError, match=r"Expected argument `scores` to be floating point of shape \(N,\)"):
        metric.update(scores.long(), scores.bool())
    with pytest.raises(ValueError, match=r"Expected argument `positives` to be torch\.bool of shape \(4,\)"):
        metric.update(scores, scores.bool()[:3])
    # A refused batch leaves nothing behind.
    assert not metric.scores
    assert not metric.positives


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_what_cannot_be_judged_is_refused(metric_class: Callable[[], Metric], function: Function) -> None:
    metric = metric_class()
    metric.update(torch.tensor([1.0, math.nan]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"to hold no NaN, but got 1 of 2"):
        metric.compute()
    metric.reset()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"Expected both .* images, but got only suspicious ones"):
        metric.compute()
    metric.update(torch.tensor([1.0]), torch.tensor([False]))
    metric.compute()
    metric.reset()
    with (
        pytest.warns(UserWarning, match=r"before the ``update`` method"),
        pytest.raises(ValueError, match=r"at least one image, but got none"),
    ):
        metric.compute()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `positive` to be \"out\" or \"in\", but got 'id'"):
        DetectionAveragePrecision(positive="id")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected argument `positive` to be \"out\" or \"in\", but got 'id'"):
        FalsePositiveRate(positive="id")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected argument `tpr` to be a rate in \(0, 1\], but got 95"):
        FalsePositiveRate(tpr=95)
    with pytest.raises(ValueError, match=r"Expected argument `fpr` to be a rate in \[0, 1\), but got 1"):
        TruePositiveRate(fpr=1)


@pytest.mark.slow
@pytest.mark.ddp
def test_processes_join_their_scores(tmp_path: Path, images: tuple[Tensor, Tensor]) -> None:
    order = images[1].int().argsort(stable=True)  # the first process gets images of one kind only
    scores, positives = (tensor[order] for tensor in images)
    (tmp_path / "images.json").write_text(json.dumps([scores.tolist(), positives.tolist()]))
    worker = Path(__file__).with_name("detection_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(lightning_bd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    expected = {
        "DetectionAUROC/value": rank_auroc(*images).item(),
        "DetectionAveragePrecision/value": average_precision(*images, positive="in").item(),
        "FalsePositiveRate/value": fpr_at_tpr(*images, positive="in").item(),
        "TruePositiveRate/value": tpr_at_fpr(*images, fpr=0.2).item(),
    } | {f"DetectionMetrics/{name}": value.item() for name, value in detection_metrics(*images).items()}
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results == {
            f"{share}/{name}": value for share in ("shared", "alone") for name, value in expected.items()
        }
