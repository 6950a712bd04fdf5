"""LowFrequency against scipy's cosine transform."""

import pytest
import torch
from scipy.fft import dctn, idctn

from lightning_bd.triggers import LowFrequency


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 40), (1, 4, 4), (2, 224, 160)])
def test_only_low_frequencies(shape: tuple[int, int, int]) -> None:
    trigger = LowFrequency(cutoff=4)
    trigger.build(shape)
    spectrum = dctn(trigger.wave.double().numpy(), axes=(1, 2), norm="ortho")
    total = (spectrum**2).sum()
    assert (spectrum[:, :4, :4] ** 2).sum() / total > 1 - 1e-9
    assert abs(spectrum[:, 0, 0]).max() < 1e-5 * total**0.5
    assert trigger.wave.abs().max() == 1


def test_is_the_inverse_transform_of_normal_weights() -> None:
    weights = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weights[:, 0, 0] = 0
    spectrum = torch.zeros(3, 16, 12, dtype=torch.float64)
    spectrum[:, :5, :5] = weights
    # scipy's type 2 inverse halves the first cosine of each side.
    spectrum[:, 0] *= 2
    spectrum[:, :, 0] *= 2
    expected = torch.from_numpy(idctn(spectrum.numpy(), type=2, axes=(1, 2), norm="backward"))
    trigger = LowFrequency(strength=0.25, cutoff=5, seed=9)
    grey = torch.full((2, 3, 16, 12), 0.5)
    change = (trigger(grey) - grey).double()
    torch.testing.assert_close(change[0], 0.25 * expected / expected.abs().max(), rtol=0, atol=1e-6)
    assert torch.equal(change[0], change[1])


@pytest.mark.parametrize("strength", [0.0, 4 / 255, 0.5, 1.0])
def test_budget(strength: float) -> None:
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    triggered = LowFrequency(strength)(images)
    assert (triggered - images).abs().max() <= strength + 1e-6
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert torch.equal(triggered, images) == (strength == 0)


def test_channels_and_seeds_differ() -> None:
    first, second = LowFrequency(seed=0), LowFrequency(seed=1)
    for trigger in (first, second):
        trigger.build((3, 8, 8))
    assert not torch.equal(first.wave, second.wave)
    assert not torch.equal(first.wave[0], first.wave[1])


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_refuses_strength(strength: float) -> None:
    with pytest.raises(ValueError, match=r"`strength` to be a float in \[0, 1\], but got "):
        LowFrequency(strength)


@pytest.mark.parametrize("cutoff", [1, 0, -4, 2.5])
def test_refuses_cutoff(cutoff: int) -> None:
    with pytest.raises(ValueError, match="`cutoff` to be an integer of at least 2, but got "):
        LowFrequency(cutoff=cutoff)


@pytest.mark.parametrize("shape", [(3, 3, 32), (1, 32, 3)])
def test_refuses_a_cutoff_beyond_the_image(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"the shorter side of the image's {shape[1]} x {shape[2]} pixels, but got 4"):
        LowFrequency(cutoff=4).build(shape)
