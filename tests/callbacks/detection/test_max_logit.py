"""The largest logit, negated."""

import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection.max_logit import MaxLogit

LOGITS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) * 5.0


def score(logits: Tensor) -> Tensor:
    return MaxLogit().score(torch.zeros(len(logits), 1), logits)


def test_equals_the_formula() -> None:
    assert score(LOGITS).tolist() == [-max(row) for row in LOGITS.tolist()]


def test_equals_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    assert torch.equal(score(LOGITS), detectors.MaxLogit.score(LOGITS))


def test_shifts_with_the_logits() -> None:
    torch.testing.assert_close(score(LOGITS + 1.0), score(LOGITS) - 1.0)


def test_smaller_logits_are_more_suspicious() -> None:
    sure, unsure = score(torch.tensor([[9.0, 0.0], [1.0, 0.0]])).tolist()
    assert sure < unsure


def test_needs_no_fit() -> None:
    detector = MaxLogit(layer="body", in_distribution="clean")
    assert detector.is_ready
    assert (detector.name, detector.layer, detector.in_distribution) == ("max_logit", "body", "clean")
