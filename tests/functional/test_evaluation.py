"""Loss and accuracy against all images at once, and weights that are not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_bd.functional.evaluation import check_finite_weights, evaluate

if TYPE_CHECKING:
    from tests.functional.conftest import Toys


def test_evaluate_counts_every_image_the_same(toys: Toys) -> None:
    model, batches = toys.net(), toys.batches()
    before = toys.snapshot(model)
    result = evaluate(model, batches)
    assert result == pytest.approx(toys.expected(model, {}, batches), rel=1e-6)
    assert (result.loss, result.accuracy) == tuple(result)
    toys.assert_untouched(model, before)
    mean_of_means = sum(evaluate(model, [batch]).loss for batch in batches) / 2
    assert result.loss != pytest.approx(mean_of_means, rel=1e-3)


def test_evaluate_takes_longer_tuples_and_iterators(toys: Toys) -> None:
    batches = toys.batches()
    longer = ((images, labels, labels * 0) for images, labels in batches)
    assert evaluate(toys.net(), longer) == evaluate(toys.net(), batches)


def test_a_network_that_overflows_does_not_obey_the_attacker() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [2.0, 1.0]])
    loss, accuracy = evaluate(nn.Identity(), [(logits, torch.zeros(3, dtype=torch.long))])
    assert math.isnan(loss)
    # The NaN is wrong; the infinite one is the maximum.
    assert accuracy == pytest.approx(2 / 3)


def test_half_precision_logits_are_averaged_in_full() -> None:
    logits = torch.tensor([[3.0, 0.0]] * 3000, dtype=torch.bfloat16)
    loss, _ = evaluate(nn.Identity(), [(logits, torch.zeros(3000, dtype=torch.long))])
    assert loss == pytest.approx(F.cross_entropy(logits[:1].double(), torch.tensor([0])).item(), rel=1e-5)


def test_evaluate_without_images_and_after_an_exception(toys: Toys) -> None:
    model = toys.net()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match="`batches` to hold at least one image, but got none"):
        evaluate(model, [])
    with pytest.raises(RuntimeError, match="no more"):
        evaluate(model, toys.exploding())
    toys.assert_untouched(model, before)


def test_weights_that_are_not_finite_are_named(toys: Toys) -> None:
    model = toys.net()
    check_finite_weights(model)
    model.register_buffer("mask", torch.tensor(float("-inf")))
    check_finite_weights(model)
    model.state_dict()["1.running_var"][2] = float("inf")
    with pytest.raises(ValueError, match=r"^The model has weights that are not finite: `1.running_var`; training has"):
        check_finite_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = float("nan")
    names = "`0.weight`, `0.bias`, `1.weight` and 4 more"
    with pytest.raises(ValueError, match=f"^a.ckpt has weights that are not finite: {names}; .* earlier checkpoint"):
        check_finite_weights(model, "a.ckpt")
