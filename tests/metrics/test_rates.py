"""The metrics of triggered images as torchmetrics: accumulation, reset, merging, synchronisation."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

import lightning_bd
from lightning_bd.functional.backdoor import attack_success_rate, attack_success_rate_all, robust_accuracy
from lightning_bd.metrics import AttackSuccessRate, AttackSuccessRateAll, RobustAccuracy

Metric = AttackSuccessRate | AttackSuccessRateAll | RobustAccuracy
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
PAIRS: tuple[tuple[type[Metric], Function], ...] = (
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
    metric_class: type[Metric], function: Function, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    metric = metric_class()
    for preds, target, original in zip(*(torch.split(tensor, [1, 60, 40]) for tensor in batch), strict=True):
        # `forward` gives the rate of the batch and adds it to the state.
        torch.testing.assert_close(
            metric(preds, target, original), function(preds, target, original), rtol=0, atol=0, equal_nan=True
        )
    assert torch.equal(metric.compute(), function(*batch))


@pytest.mark.parametrize("metric_class", METRICS)
def test_reset_forgets(metric_class: type[Metric], batch: tuple[Tensor, Tensor, Tensor]) -> None:
    metric = metric_class()
    metric.update(*batch)
    metric.reset()
    labels = torch.tensor([1, 1])
    metric.update(labels, labels, torch.tensor([0, 0]))
    assert metric.compute().item() == (0.0 if metric_class is RobustAccuracy else 1.0)


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_merged_metrics_give_the_rate_of_all_images(
    metric_class: type[Metric], function: Function, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
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
    assert int(attack.attacked_images) == int(robust.attacked_images) == int((target != original).sum())


def test_a_collection_keeps_the_rates_apart(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    # A collection updates metrics as one if their states are equal after the first update, as here: no image counts
    # as a success of any of them.
    metrics = MetricCollection([metric_class() for metric_class in METRICS])
    first = torch.full((3,), 2), torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    metrics.update(*first)
    metrics.update(*batch)
    rates = metrics.compute()
    for metric_class in METRICS:
        alone = metric_class()
        alone.update(*first)
        alone.update(*batch)
        assert torch.equal(rates[metric_class.__name__], alone.compute())


@pytest.mark.parametrize("metric_class", METRICS)
def test_no_image_counted_gives_nan(metric_class: type[Metric]) -> None:
    metric = metric_class()
    empty = torch.zeros(0, dtype=torch.long)
    metric.update(torch.zeros(0, 4), empty, empty)
    assert metric.compute().isnan()


@pytest.mark.parametrize("metric_class", METRICS)
def test_wrong_labels_are_refused(metric_class: type[Metric]) -> None:
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Expected arguments `target` and `original` to be integer labels"):
        metric_class().update(labels, labels, labels[:1])


@pytest.mark.slow
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
    # Four of the ten images are outside the target class; two of these are predicted as the target, two as themselves.
    # The target is predicted for 3 of the first five images and 4 of the last five.
    expected = {"AttackSuccessRate": 2 / 4, "AttackSuccessRateAll": 7 / 10, "RobustAccuracy": 2 / 4}
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected)
