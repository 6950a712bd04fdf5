"""Generalized entropy against the formula in float64."""

import math

import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection.gen import GEN


def draw(scale: float, classes: int = 10) -> Tensor:
    return torch.randn(64, classes, generator=torch.Generator().manual_seed(0)) * scale


def score(logits: Tensor, gamma: float = 0.1, top_classes: int = 100) -> Tensor:
    return GEN(gamma, top_classes).score(torch.zeros(len(logits), 1), logits)


def by_hand(logits: Tensor, gamma: float, top_classes: int) -> Tensor:
    """The rest is summed over the others, since 1 - p is rounded in float64 too."""
    scores = []
    for row in logits.double().softmax(dim=1):
        p = row.sort(descending=True).values.tolist()
        terms = [(p[j] * sum(p[:j] + p[j + 1 :])) ** gamma for j in range(min(top_classes, len(p)))]
        scores.append(sum(terms))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("top_classes", [1, 3, 10, 100])
@pytest.mark.parametrize("gamma", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_equals_the_formula(scale: float, gamma: float, top_classes: int) -> None:
    logits = draw(scale)
    expected = by_hand(logits, gamma, top_classes)
    torch.testing.assert_close(score(logits, gamma, top_classes).double(), expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("top_classes", [3, 10])
def test_equals_pytorch_ood(top_classes: int) -> None:
    """Its mean is our sum; where its clipping at 1e-7 does not matter."""
    detectors = pytest.importorskip("pytorch_ood.detector")
    expected = detectors.GEN.score(draw(1.0), gamma=0.1, M=top_classes) * top_classes
    torch.testing.assert_close(score(draw(1.0), 0.1, top_classes), expected)


def test_tells_sure_images_apart() -> None:
    margins = torch.tensor([20.0, 30.0, 60.0])
    scores = score(torch.stack([margins, torch.zeros(3)], dim=1))
    torch.testing.assert_close(scores, 2 * torch.exp(-0.1 * margins), rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [1, 2, 10, 200])
def test_large_logits(classes: int) -> None:
    assert score(draw(1e4, classes)).isfinite().all()


def test_ties_at_the_top() -> None:
    """p = 1/2 twice: 2 * 4 ** -gamma."""
    expected = torch.tensor([2 * 4**-0.1])
    torch.testing.assert_close(score(torch.tensor([[1e4, 1e4, 0.0]])), expected)


def test_an_image_does_not_depend_on_its_batch() -> None:
    logits = draw(3.0)
    assert torch.equal(torch.cat([score(row[None]) for row in logits]), score(logits))


def test_bad_values() -> None:
    for gamma in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="Expected argument `gamma` to be a positive float"):
            GEN(gamma)
    with pytest.raises(ValueError, match="Expected argument `top_classes` to be a positive integer, but got 0"):
        GEN(top_classes=0)
