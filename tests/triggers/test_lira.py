"""LIRA's trigger against its formula."""

import pytest
import torch

from lightning_bd.triggers import LIRATrigger

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.3])
def test_noise_is_added_within_the_budget(strength: float) -> None:
    trigger = LIRATrigger(strength, width=4, seed=2)
    trigger.build((3, 8, 8))
    noise = torch.tanh(trigger.network(IMAGES))
    assert torch.allclose(trigger(IMAGES), (IMAGES + strength * noise).clamp(0, 1), atol=1e-6)
    assert (trigger(IMAGES) - IMAGES).abs().max() <= strength + 1e-6
    assert (trigger(IMAGES) != IMAGES).any() == (strength > 0)


def test_the_budget_holds_for_any_weights() -> None:
    trigger = LIRATrigger(0.05, width=4)
    trigger.build((3, 8, 8))
    with torch.no_grad():
        for parameter in trigger.parameters():
            parameter.mul_(1000)
    triggered = trigger(IMAGES)
    assert (triggered - IMAGES).abs().max() <= 0.05 + 1e-6
    assert triggered.min() >= 0
    assert triggered.max() <= 1


def test_images_have_noise_of_their_own() -> None:
    trigger = LIRATrigger(0.1, width=4)
    trigger(IMAGES)
    noise = trigger.noise(IMAGES)
    assert not torch.allclose(noise[0], noise[1], atol=1e-2)


def test_the_gradient_reaches_every_weight() -> None:
    trigger = LIRATrigger(0.1, width=4)
    trigger.build((3, 8, 8))
    trigger.requires_grad_(True)
    (trigger(IMAGES) * IMAGES).sum().backward()
    for name, parameter in trigger.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_wrong_strength_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"`strength` to be a float in \[0, 1\], but got"):
        LIRATrigger(strength)
