"""Free energy against sums of exponentials in float64."""

import math

import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection.energy import Energy, energy_of_logits


def draw(scale: float) -> Tensor:
    return torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) * scale


def score(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return Energy(temperature).score(torch.zeros(len(logits), 1), logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0, 1000.0])
def test_equals_the_formula(temperature: float) -> None:
    logits = draw(5.0)
    expected = -temperature * (logits.double() / temperature).exp().sum(dim=1).log()
    torch.testing.assert_close(score(logits, temperature).double(), expected, rtol=1e-5, atol=1e-5)


def test_equals_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    torch.testing.assert_close(score(draw(5.0), 2.0), detectors.EnergyBased.score(draw(5.0), t=2.0))


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_large_logits(temperature: float) -> None:
    scores = score(draw(1e4), temperature)
    torch.testing.assert_close(scores, -draw(1e4).amax(dim=1), rtol=1e-5, atol=0)


def test_equal_logits() -> None:
    expected = torch.full((3,), -1e4 - math.log(4))
    torch.testing.assert_close(energy_of_logits(torch.full((3, 4), 1e4)), expected)


def test_shifts_with_the_logits() -> None:
    torch.testing.assert_close(score(draw(5.0) + 1.0), score(draw(5.0)) - 1.0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    logits = draw(3.0)
    assert torch.equal(torch.cat([score(row[None]) for row in logits]), score(logits))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="Expected argument `temperature` to be a positive float"):
        Energy(temperature)


def test_temperatures_are_kept_apart() -> None:
    assert Energy(1.0).state_key != Energy(2.0).state_key
    assert Energy().name == "energy"
