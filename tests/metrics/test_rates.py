"""The metrics of triggered images as torchmetrics: accumulation, reset, merging, synchronisation."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

import lightning_bd
from lightning_bd.functional.backdoor import attack_success_rate, attack_success_rate_all, robust_accuracy
from lightning_bd.metrics import AttackSuccessRate, AttackSuccessRateAll, RobustAccuracy

Metric = AttackSuccessRate | AttackSuccessRateAll | RobustAccuracy
PAIRS = (
    (AttackSuccessRate, attack_success_rate),
    (AttackSuccessRateAll, attack_success_rate_all),
    (RobustAccuracy, robust_accuracy),
)
METRICS = tuple(metric for metric, _ in PAIRS)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(4, (101,), generator=generator)
    return torch.randn(101, 4, generator=generator), torch.randint(4, (101,), generator=generator), original


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_batches_of_any_size_give_the_rate_of_all_images(
    metric_class: type[Metric], function: object, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    assert callable(function)
    metric = metric_class()
    for preds, target, original in zip(*(tensor.split([1, 60, 40]) for tensor in batch), strict=True):
        # `forward` gives the rate of the batch and adds it to the state.
        assert torch.equal(metric(preds, target, original), function(preds, target, original)) or original.numel() == 1
    assert torch.equal(metric.compute(), function(*batch))


@pytest.mark.parametrize("metric_class", METRICS)
def test_reset_forgets(metric_class: type[Metric], batch: tuple[Tensor, Tensor, Tensor]) -> None:
    metric = metric_class()
    metric.update(*batch)
    metric.reset()
    assert int(metric.successes) == int(metric.total) == 0
    labels = torch.tensor([1, 1])
    metric.update(labels, labels, torch.tensor([0, 0]))
    assert metric.compute().item() == (0.0 if metric_class is RobustAccuracy else 1.0)


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_merged_metrics_give_the_rate_of_all_images(
    metric_class: type[Metric], function: object, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    assert callable(function)
    first, second = metric_class(), metric_class()
    first.update(*(tensor[:30] for tensor in batch))
    second.update(*(tensor[30:] for tensor in batch))
    first.merge_state(second)
    assert torch.equal(first.compute(), function(*batch))


def test_attack_success_and_robust_accuracy_count_the_same_images(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    attack, robust = AttackSuccessRate(), RobustAccuracy()
    attack.update(*batch)
    robust.update(*batch)
    _, target, original = batch
    assert int(attack.total) == int(robust.total) == int((target != original).sum())


def test_a_collection_keeps_the_rates_apart(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    # Collections merge metrics whose states are equal after the first update.
    metrics = MetricCollection([metric_class() for metric_class in METRICS])
    target_only = torch.zeros(3, dtype=torch.long)
    metrics.update(target_only, target_only, target_only)
    metrics.update(*batch)
    rates = metrics.compute()
    alone = AttackSuccessRate()
    alone.update(*batch)
    assert torch.equal(rates["AttackSuccessRate"], alone.compute())
    assert rates["RobustAccuracy"] != rates["AttackSuccessRate"]


@pytest.mark.parametrize("metric_class", METRICS)
def test_no_image_counted_gives_nan(metric_class: type[Metric]) -> None:
    metric = metric_class()
    empty = torch.zeros(0, dtype=torch.long)
    metric.update(torch.zeros(0, 4), empty, empty)
    assert metric.compute().isnan()


def test_half_precision_model_keeps_exact_counts() -> None:
    # 2,049 is the first integer that float16 cannot hold.
    metric = copy.deepcopy(AttackSuccessRate()).half()
    target = torch.ones(2049, dtype=torch.long)
    metric.update(target, target, torch.zeros_like(target))
    assert int(metric.total) == 2049


@pytest.mark.parametrize("metric_class", METRICS)
def test_wrong_labels_are_refused(metric_class: type[Metric]) -> None:
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Expected arguments `target` and `original` to be integer labels"):
        metric_class().update(labels, labels, labels[:1])


@pytest.mark.ddp
def test_processes_sum_their_counts(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("sync_worker.py")
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
    # Of the ten images four are counted, and of these two are predicted as the target and two as themselves; the
    # target is predicted for 3 of the first five and 4 of the last five. The own counts are back after `compute`.
    own_counts = [{"AttackSuccessRate": 4, "AttackSuccessRateAll": 5, "RobustAccuracy": 4}] * 2
    own_counts[1] = {"AttackSuccessRate": 0, "AttackSuccessRateAll": 5, "RobustAccuracy": 0}
    rates = {"AttackSuccessRate": 2 / 4, "AttackSuccessRateAll": 7 / 10, "RobustAccuracy": 2 / 4}
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, (rate, total) in results.items():
            assert rate == pytest.approx(rates[name]), name
            assert total == own_counts[rank][name], name
