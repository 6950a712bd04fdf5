"""One minus the largest probability, also where that rounds to one."""

import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection.maximum_softmax_probability import MaximumSoftmaxProbability


def draw(scale: float, count: int = 64, classes: int = 10) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(0)) * scale


def score(logits: Tensor) -> Tensor:
    return MaximumSoftmaxProbability().score(torch.zeros(len(logits), 1), logits)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_equals_the_formula(scale: float) -> None:
    logits = draw(scale)
    expected = 1.0 - logits.double().softmax(dim=1).max(dim=1).values
    torch.testing.assert_close(score(logits).double(), expected, rtol=1e-6, atol=1e-12)


def test_equals_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    logits = draw(3.0)
    torch.testing.assert_close(score(logits) - 1.0, detectors.MaxSoftmax.score(logits), rtol=0, atol=1e-6)


def test_tells_sure_images_apart() -> None:
    margins = torch.tensor([20.0, 30.0, 60.0, 90.0])
    logits = torch.stack([margins, torch.zeros(4)], dim=1)
    assert logits.softmax(dim=1).max(dim=1).values.tolist() == [1.0] * 4
    torch.testing.assert_close(score(logits), torch.exp(-margins), rtol=1e-5, atol=0)


def test_depends_on_differences_only() -> None:
    logits = draw(1.0)
    torch.testing.assert_close(score(logits + 64.0), score(logits), rtol=1e-4, atol=0)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(score(logits[:, order]), score(logits))


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_large_logits(classes: int) -> None:
    scores = score(draw(1e4, classes=classes))
    assert scores.isfinite().all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_equal_logits_are_the_most_suspicious() -> None:
    torch.testing.assert_close(score(torch.full((2, 4), 1e4)), torch.full((2,), 0.75))


def test_an_image_does_not_depend_on_its_batch() -> None:
    logits = draw(3.0)
    assert torch.equal(torch.cat([score(row[None]) for row in logits]), score(logits))


def test_needs_no_fit() -> None:
    detector = MaximumSoftmaxProbability(in_distribution="clean")
    assert detector.is_ready
    assert (detector.name, detector.in_distribution) == ("msp", "clean")
