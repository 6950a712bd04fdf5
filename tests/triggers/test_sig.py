"""SIG against its formula in numpy."""

import numpy as np
import pytest
import torch

from lightning_bd.triggers import SIG


@pytest.mark.parametrize(
    ("amplitude", "frequency", "shape"),
    [(20 / 255, 6.0, (3, 32, 32)), (0.6, 1.5, (1, 8, 20)), (1.0, 0.0, (3, 5, 4))],
)
def test_formula(amplitude: float, frequency: float, shape: tuple[int, int, int]) -> None:
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    columns = np.arange(shape[2])
    wave = amplitude * np.sin(2 * np.pi * frequency * columns / shape[2])
    expected = np.clip(images.double().numpy() + wave, 0, 1)
    np.testing.assert_allclose(SIG(amplitude, frequency)(images).numpy(), expected, rtol=0, atol=2e-7)


def test_the_default_wave_is_the_papers() -> None:
    # 6 periods over 32 columns: sin(2 pi 6 j / 32) is sin(1.5 pi) at column 4, sin(4.5 pi) at column 12.
    triggered = SIG()(torch.full((1, 3, 32, 32), 0.5))
    for column, change in ((0, 0.0), (4, -20 / 255), (12, 20 / 255)):
        assert triggered[..., column].unique().tolist() == pytest.approx([0.5 + change])


def test_the_sum_is_clamped() -> None:
    images = torch.cat([torch.zeros(1, 1, 4, 16), torch.ones(1, 1, 4, 16)])
    triggered = SIG(amplitude=0.5, frequency=1.0)(images)
    assert (triggered[0, 0, :, 9:] == 0).all()
    assert (triggered[1, 0, :, 1:8] == 1).all()


def test_no_amplitude_changes_nothing() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(SIG(amplitude=0.0)(images), images)


@pytest.mark.parametrize("amplitude", [-0.1, 1.5, float("nan")])
def test_refuses_amplitude(amplitude: float) -> None:
    with pytest.raises(ValueError, match=r"`amplitude` to be a float in \[0, 1\], but got "):
        SIG(amplitude=amplitude)


@pytest.mark.parametrize("frequency", [-1.0, float("inf"), float("nan")])
def test_refuses_frequency(frequency: float) -> None:
    with pytest.raises(ValueError, match="`frequency` to be a non-negative float, but got "):
        SIG(frequency=frequency)
