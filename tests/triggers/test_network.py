"""Triggers that are networks: they travel as weights, are frozen, and a hostile file cannot make them large."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets, InputAwareTrigger, LIRATrigger, SequentialTrigger, Trigger
from lightning_bd.triggers.encoder_decoder import EncoderDecoder, check_size
from lightning_bd.triggers.network import NetworkTrigger

SHAPE = (1, 8, 8)
IMAGES = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))


class Tint(NetworkTrigger):
    """One convolution."""

    def __init__(self, kernel_size: int = 1, seed: int = 0) -> None:
        super().__init__(seed)
        self.kernel_size = kernel_size

    def _network(self, image_shape: tuple[int, int, int]) -> nn.Module:
        return nn.Conv2d(image_shape[0], image_shape[0], self.kernel_size, padding="same")

    def _transform(self, images: Tensor) -> Tensor:
        return self.run_network(images).sigmoid().to(images.dtype)


TRIGGERS = [Tint(3, seed=4), LIRATrigger(0.2, width=4, seed=4), InputAwareTrigger(width=4, depth=1, seed=4)]


def built(trigger: Trigger) -> Trigger:
    trigger = copy.deepcopy(trigger)
    trigger.build(SHAPE)
    return trigger


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda t: type(t).__name__)
def test_state_has_the_names_and_shapes_of_the_specs(trigger: NetworkTrigger) -> None:
    state = built(trigger).state_dict()
    specs = trigger._specs(SHAPE)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {n: s.shape for n, s in specs.items()}
    assert all(name.startswith("network.") and tensor.dtype is torch.float32 for name, tensor in state.items())
    assert all(not tensor.requires_grad for tensor in built(trigger).parameters())
    assert not any(module.training for module in built(trigger).network.modules())  # type: ignore[union-attr]


def test_what_the_network_makes_is_what_torch_makes() -> None:
    trigger = built(Tint(3))
    state = trigger.state_dict()
    expected = torch.sigmoid(
        torch.conv2d(IMAGES, state["network.weight"], state["network.bias"], padding=1)
    )  # fmt: skip
    assert torch.allclose(trigger(IMAGES), expected, atol=1e-6)


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda t: type(t).__name__)
def test_a_twin_with_the_weights_gives_the_same_pixels(trigger: NetworkTrigger) -> None:
    first = built(trigger)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)  # trained
    twin = type(trigger)(**trigger.hyperparameters)  # type: ignore[arg-type]
    assert not torch.equal(twin(IMAGES), first(IMAGES))
    twin.restore(SHAPE, first.state_dict())
    assert torch.equal(twin(IMAGES), first(IMAGES))
    with torch.no_grad():
        next(first.parameters()).add_(1)
    assert not torch.equal(twin(IMAGES), first(IMAGES))


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda t: type(t).__name__)
def test_initial_weights_come_from_the_seed_alone(trigger: NetworkTrigger) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = built(trigger).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    second = built(trigger).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = copy.deepcopy(trigger)
    other.seed += 1
    other.build(SHAPE)
    assert any(not torch.equal(first[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda t: type(t).__name__)
def test_an_image_does_not_depend_on_its_batch(trigger: NetworkTrigger) -> None:
    triggered = built(trigger)(IMAGES)
    for row, image in enumerate(IMAGES):
        assert torch.allclose(built(trigger)(image[None])[0], triggered[row], atol=1e-5)


def test_half_precision_and_autocast_do_not_change_the_trigger() -> None:
    trigger = built(LIRATrigger(0.2, width=4))
    assert isinstance(trigger, LIRATrigger)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trigger(IMAGES), built(trigger)(IMAGES))
    half = trigger(IMAGES.half())
    assert half.dtype is torch.float16
    assert torch.allclose(half.float(), trigger(IMAGES), atol=2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    trigger = built(Tint())
    weights = {name: tensor.clone() for name, tensor in trigger.state_dict().items()}
    weights["network.bias"][0] = value
    with pytest.raises(ValueError, match=r"`network.bias` to hold finite values"):
        trigger.restore(SHAPE, weights)
    weights["network.bias"][0] = torch.finfo(torch.float32).max
    trigger.restore(SHAPE, weights)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`network.weight` to have shape \(1, 1, 3, 3\), but got \(1, 1, 1, 1\)"):
        Tint(3).restore(SHAPE, built(Tint(1)).state_dict())
    with pytest.raises(ValueError, match="to be named"):
        Tint(3).restore(SHAPE, {})


def test_a_part_of_another_trigger_travels_with_it() -> None:
    whole = SequentialTrigger([BadNets(2), LIRATrigger(0.2, width=4, seed=1)])
    whole.build(SHAPE)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(1.5)
    twin = SequentialTrigger([BadNets(2), LIRATrigger(0.2, width=4, seed=1)])
    twin.restore(SHAPE, whole.state_dict())
    assert torch.equal(twin(IMAGES), whole(IMAGES))


def test_a_manifest_rebuilds_it_and_refuses_a_huge_one() -> None:
    poison = Poison(LIRATrigger(0.2, width=4, seed=1))
    poison.prepare(SHAPE, 10)
    with torch.no_grad():
        for parameter in poison.trigger.parameters():
            parameter.mul_(1.5)
    manifest = PoisonManifest.describe(poison, {"name": "x", "sha256": "", "images": 1, "classes": 10})
    assert torch.equal(manifest.build_trigger()(IMAGES), poison.trigger(IMAGES))
    arguments: Any = manifest.trigger["arguments"]
    arguments["width"] = 10**9
    with pytest.raises(ValueError, match=r"`width` to be an integer in \[1, 256\], but got 1000000000"):
        manifest.build_trigger()
    # Within the bounds, but the file does not bring such weights: nothing of that size is made.
    arguments["width"] = 256
    with pytest.raises(ValueError, match="LIRATrigger cannot be built"):
        manifest.build_trigger()


def test_the_default_networks_are_small() -> None:
    for trigger in (LIRATrigger(), InputAwareTrigger()):
        trigger.build((3, 32, 32))
        assert sum(tensor.numel() for tensor in trigger.state_dict().values()) * 4 < 2**20


def test_moved_in_inference_mode_it_can_still_be_trained() -> None:
    trigger = Tint()
    with torch.inference_mode():
        trigger(IMAGES)
    trigger.requires_grad_(True)
    trigger(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in trigger.parameters())


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (15, 8)])
@pytest.mark.parametrize("skips", [False, True])
def test_encoder_decoder_keeps_any_size(size: tuple[int, int], skips: bool) -> None:
    assert EncoderDecoder(2, 3, size, 4, 2, skips)(torch.zeros(1, 2, *size)).shape == (1, 3, *size)


def test_encoder_decoder_refuses_what_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"at least 16 pixels along each side for `depth` 3, but got 8x19. Lower `depth`"
    ):
        EncoderDecoder(1, 1, (8, 19), depth=3)
    for name, value in (("width", 0), ("width", 257), ("depth", 7), ("depth", True)):
        with pytest.raises(ValueError, match=f"`{name}` to be an integer in"):
            check_size(**{"width": 4, "depth": 2, name: value})
    with pytest.raises(ValueError, match="`depth` to be an integer in"):
        EncoderDecoder(1, 1, (8, 8), depth=0)
