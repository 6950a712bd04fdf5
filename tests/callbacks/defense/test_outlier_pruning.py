"""How channels are silenced by their scores, and how the threshold is chosen."""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData, Defense, Report
from lightning_bd.callbacks.defense.batch_norm_pruning import BatchNormPruning
from lightning_bd.callbacks.defense.channel_lipschitz_pruning import ChannelLipschitzPruning
from lightning_bd.callbacks.defense.entropy_pruning import EntropyPruning
from lightning_bd.callbacks.defense.outlier_pruning import (
    check_thresholds,
    is_prunable,
    prune_outliers,
    watch_inputs,
)
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule, PhaseData

# Channel k of 16 decides on class k, so that each channel that is silenced costs 1 of 16 validation images.
SCORES = torch.arange(16.0).square()


def make_model() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 16, bias=False)).eval()
    nn.init.eye_(model[1].weight)  # type: ignore[arg-type]
    model[0].bias.data.fill_(0.5)  # type: ignore[operator]
    return model


def validation() -> Iterator[tuple[Tensor, Tensor]]:
    for part in torch.split(torch.arange(16), 5):
        yield torch.eye(16)[part], part


def refuse(*_: object) -> Iterator[tuple[Tensor, Tensor]]:
    raise AssertionError("not to be looked at")


def norm_of(model: nn.Sequential) -> _BatchNorm:
    assert isinstance(model[0], _BatchNorm)
    return model[0]


def prune(model: nn.Sequential, candidates: Sequence[float], max_drop: float = 0.0) -> Report:
    scores = {"0": (norm_of(model), SCORES)}
    return prune_outliers(model, DefenderData(refuse, validation, 16), scores, candidates, max_drop)


def count(u: float) -> int:
    """Number of scores above the mean plus u unbiased standard deviations, by the formula."""
    mean = sum(SCORES.tolist()) / 16
    deviation = math.sqrt(sum((score - mean) ** 2 for score in SCORES.tolist()) / 15)
    return sum(score > mean + u * deviation for score in SCORES.tolist())


def test_a_single_threshold_needs_no_validation() -> None:
    model = make_model()
    scores = {"0": (norm_of(model), SCORES)}
    report = prune_outliers(model, DefenderData(refuse, refuse, 16), scores, [1.0], max_drop=0.0)
    number = count(1.0)
    assert 1 < number < 8
    for parameter, left in ((norm_of(model).weight, 1.0), (norm_of(model).bias, 0.5)):
        assert parameter.tolist() == [left] * (16 - number) + [0.0] * number
    assert report.values == {"u": 1.0, "pruned": number, "channels": 16, "pruned/0": number}
    assert report.note == f"pruned {number} of 16 channels"
    assert report.epochs == 0


def test_several_layers_have_their_own_thresholds() -> None:
    first, second = nn.BatchNorm1d(16), nn.BatchNorm2d(4)
    scores = {"a.b": (first, SCORES), "c": (second, torch.tensor([1e9, 0.0, 0.0, 0.0]))}
    report = prune_outliers(nn.Module(), DefenderData(refuse, refuse, 2), scores, [1.4], max_drop=0.0)
    assert second.weight.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert report.values["pruned/a.b"] == count(1.4) == (first.weight == 0).sum()
    assert report.values["pruned/c"] == 1
    assert report.note == f"pruned {count(1.4) + 1} of 20 channels"


def test_nothing_exceeds_the_threshold() -> None:
    model, before = make_model(), make_model().state_dict()
    report = prune(model, [100.0])
    assert report.note == "pruned 0 of 16 channels: no channel exceeded the threshold"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("dropped", "expected"), [(1, 1.9), (2, 1.5), (4, 1.0), (5, 0.5), (16, 0.5)])
def test_the_smallest_threshold_that_keeps_the_accuracy(dropped: int, expected: float) -> None:
    """With max_drop of exactly so many images the threshold is taken that costs no more."""
    candidates = (0.5, 1.0, 1.5, 1.9)
    assert [count(u) for u in candidates] == [5, 3, 2, 1]
    model = make_model()
    report = prune(model, candidates, dropped / 16)
    number = count(expected)
    assert (norm_of(model).weight == 0).nonzero().flatten().tolist() == list(range(16 - number, 16))
    assert report.values["u"] == expected
    assert report.values["validation_accuracy_before"] == 1
    assert report.values["validation_accuracy"] == 1 - number / 16
    assert report.note == f"pruned {number} of 16 channels, u {expected:g}"


def test_no_threshold_keeps_the_accuracy() -> None:
    model = make_model()
    with pytest.warns(UserWarning, match=r"Pruning lost more than 0.05 of clean accuracy at every `u`"):
        report = prune(model, (0.5, 1.9), 0.05)
    assert report.values["u"] == 1.9
    assert norm_of(model).weight.tolist() == [1.0] * 15 + [0.0]
    assert report.note == "pruned 1 of 16 channels, u 1.9, yet 6.2 points of validation accuracy lost"


def test_an_exception_between_candidates_puts_the_weights_back() -> None:
    passes: list[int] = []

    def breaks() -> Iterator[tuple[Tensor, Tensor]]:
        passes.append(0)
        if len(passes) == 2:
            raise RuntimeError("the disk is gone")
        return validation()

    model = make_model()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        prune_outliers(model, DefenderData(refuse, breaks, 16), {"0": (norm_of(model), SCORES)}, [1.0, 3.0], 0.0)
    assert norm_of(model).weight.tolist() == [1.0] * 16
    assert norm_of(model).bias.tolist() == [0.5] * 16


def test_two_scores_of_one_layer() -> None:
    """Two convolutions may share a normalisation; restoring for the second must not undo the first."""
    model = make_model()
    scores = {"a": (norm_of(model), SCORES), "b": (norm_of(model), SCORES.flip(0))}
    prune_outliers(model, DefenderData(refuse, validation, 16), scores, [1.9, 3.0], max_drop=1.0)
    assert norm_of(model).weight.tolist() == [0.0] + [1.0] * 14 + [0.0]


def test_watching_leaves_no_trace_and_sees_all() -> None:
    model = make_model().train()
    model[1].eval()
    seen: list[Tensor] = []
    batches = [(torch.rand(3, 16), torch.zeros(3)), (torch.rand(2, 16), torch.zeros(2))]
    data = DefenderData(lambda epoch: iter(batches if epoch == 0 else []), refuse, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    watch_inputs(model, data, {"0": norm_of(model)}, lambda name, values: seen.append(values))
    assert all(torch.equal(values, images) for values, (images, _) in zip(seen, batches, strict=True))
    assert not any(values.requires_grad for values in seen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [model[0].training, model[1].training] == [True, False]
    assert not model[0]._forward_pre_hooks


def test_watching_leaves_no_trace_after_an_exception() -> None:
    model = make_model().train()

    def see(name: str, values: Tensor) -> None:
        raise RuntimeError("stop")

    data = DefenderData(lambda epoch: iter([(torch.rand(3, 16), torch.zeros(3))]), refuse, 16)
    with pytest.raises(RuntimeError, match="stop"):
        watch_inputs(model, data, {"0": norm_of(model)}, see)
    assert not model[0]._forward_pre_hooks
    assert model.training
    assert model[0].training


def test_no_training_images() -> None:
    model = make_model()
    data = DefenderData(lambda epoch: iter([]), refuse, 16)
    with pytest.raises(MisconfigurationException, match="no training images: give the phase a larger split"):
        watch_inputs(model, data, {"0": norm_of(model)}, lambda name, values: None)


def test_which_layers_may_be_pruned() -> None:
    frozen, half = nn.BatchNorm2d(2).requires_grad_(False), nn.BatchNorm2d(2)
    half.bias.requires_grad_(False)
    assert is_prunable(nn.BatchNorm2d(2))
    assert is_prunable(nn.BatchNorm1d(2, track_running_stats=False))
    assert not any(is_prunable(layer) for layer in (frozen, half, nn.BatchNorm2d(2, affine=False)))


def test_thresholds_are_sorted() -> None:
    assert check_thresholds(3.0, 0.01) == (3.0,)
    assert check_thresholds([4, 0.0, 2.5], 0.0) == (0.0, 2.5, 4.0)


@pytest.mark.parametrize(
    ("u", "max_drop", "message"),
    [
        (-0.1, 0.0, "`u` to be a non-negative float or several of them, but got -0.1."),
        (math.nan, 0.0, "`u` to be a non-negative float or several of them, but got nan."),
        ([], 0.0, "`u` to be a non-negative float or several of them, but got []."),
        ([3.0, -1.0], 0.0, "`u` to be a non-negative float or several of them, but got [3.0, -1.0]."),
        (3.0, -0.1, "`max_drop` to be in [0, 1], but got -0.1."),
        (3.0, 1.1, "`max_drop` to be in [0, 1], but got 1.1."),
    ],
)
def test_refuses(u: float | Sequence[float], max_drop: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {re.escape(message)}"):
        check_thresholds(u, max_drop)


@pytest.mark.parametrize("make", [ChannelLipschitzPruning, BatchNormPruning, EntropyPruning])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_trainer_runs_them_like_a_call_by_hand(
    make: Callable[[float], Defense], precision: Literal["32-true", "bf16-mixed"], tmp_path: Path
) -> None:
    view = DigitsDataModule(splits={"defend": 0.2, "rest": 0.8}).defender_view(
        PhaseData("defend", ("defend",), None, 32)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = BackdoorClassifier(backbones.small_cnn(10, in_channels=1), num_classes=10)
    twin, defense = copy.deepcopy(module), make(1.0)
    trainer = Trainer(
        accelerator="cpu", max_epochs=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[defense], default_root_dir=tmp_path, precision=precision,
    )  # fmt: skip
    trainer.fit(module, datamodule=view)
    by_hand = make(1.0).purify(
        twin,
        DefenderData(
            lambda epoch: view.batches("train", epoch=epoch),
            lambda: view.batches("validation"),
            10,
            forward_context=trainer.precision_plugin.forward_context,
        ),
    )
    assert defense.report == by_hand
    assert by_hand.values["pruned"] > 0
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))


def test_progress_is_shown_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    for show in (False, True):
        data = DefenderData(lambda epoch: iter([(torch.eye(16), torch.zeros(16))]), refuse, 16, show_progress=show)
        watch_inputs(model, data, {"0": norm_of(model)}, lambda name, values: None)
        assert ("measuring channels" in capsys.readouterr().err) == show
