"""SequentialTrigger against its parts, one call at a time."""

import pytest
import torch
from torch import Tensor

from lightning_bd.triggers import SIG, BadNets, Blended, BppAttack, SequentialTrigger, TrainTestTrigger, Trigger, WaNet


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def test_order_counts(images: Tensor) -> None:
    blended, patch = Blended(), BadNets()
    assert torch.equal(SequentialTrigger([blended, patch])(images), patch(blended(images)))
    assert torch.equal(SequentialTrigger([patch, blended])(images), blended(patch(images)))
    assert not torch.equal(SequentialTrigger([blended, patch])(images), SequentialTrigger([patch, blended])(images))


@pytest.mark.parametrize("trigger", [SIG(), WaNet(), BppAttack()])
def test_one_trigger_alone_is_that_trigger(images: Tensor, trigger: Trigger) -> None:
    alone = SequentialTrigger([trigger])
    assert torch.equal(alone(images), trigger(images))
    covers = alone.cover(images, torch.Generator().manual_seed(1))
    assert torch.equal(covers, trigger.cover(images, torch.Generator().manual_seed(1)))


def test_the_same_trigger_twice(images: Tensor) -> None:
    sig = SIG()
    twice = SequentialTrigger([sig, sig])
    assert twice.triggers == (sig, sig)
    assert torch.equal(twice(images), sig(sig(images)))
    twin = SequentialTrigger([SIG(), SIG()])
    twin.restore((3, 12, 10), twice.state_dict())
    assert torch.equal(twin(images), twice(images))


def test_covers_draw_in_turn(images: Tensor) -> None:
    first, second = WaNet(seed=1), BppAttack()
    covers = SequentialTrigger([first, second]).cover(images, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(covers, second.cover(first.cover(images, generator), generator))


def test_attack_is_the_attack_of_each(images: Tensor) -> None:
    pair = TrainTestTrigger(SIG(0.1), SIG(0.3))
    trigger = SequentialTrigger([pair, BadNets()])
    assert torch.equal(trigger(images), BadNets()(SIG(0.1)(images)))
    assert torch.equal(trigger.attack(images), BadNets()(SIG(0.3)(images)))


def test_state_is_prefixed_and_restored(images: Tensor) -> None:
    trigger = SequentialTrigger([WaNet(seed=3), SequentialTrigger([Blended(), BppAttack()]), BadNets(seed=4)])
    expected = trigger(images)
    assert list(trigger.state_dict()) == ["0.grid", "1.0.picture", "2.pattern_values"]
    saved = {name: tensor * 0.5 for name, tensor in trigger.state_dict().items()}
    twin = SequentialTrigger([WaNet(), SequentialTrigger([Blended(), BppAttack()]), BadNets()])
    twin.restore((3, 12, 10), saved)
    for part in twin.triggers:
        assert part.image_shape == (3, 12, 10)
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in saved.items())
    twin.restore((3, 12, 10), trigger.state_dict())
    assert torch.equal(twin(images), expected)


def test_a_part_keeps_what_it_was_restored_with(images: Tensor) -> None:
    sig = SIG(0.5)
    sig.restore((3, 12, 10), {"wave": torch.zeros(10)})
    assert torch.equal(SequentialTrigger([sig])(images), images)


def test_hyperparameters_describe_the_parts() -> None:
    trigger = SequentialTrigger([SIG(0.25), SequentialTrigger([BppAttack(5)])])
    assert trigger.hyperparameters == {
        "triggers": [
            {"class": "SIG", "arguments": {"amplitude": 0.25, "frequency": 6.0}},
            {
                "class": "SequentialTrigger",
                "arguments": {"triggers": [{"class": "BppAttack", "arguments": {"bits": 5, "dithering": False}}]},
            },
        ]
    }


def test_repr_shows_each_part_once() -> None:
    assert repr(SequentialTrigger([SIG(0.25)])) == "SequentialTrigger(\n  (0): SIG(amplitude=0.25, frequency=6.0)\n)"


def test_refuses_a_part_of_another_shape() -> None:
    patch = BadNets()
    patch.build((3, 8, 8))
    trigger = SequentialTrigger([SIG(), patch])
    with pytest.raises(ValueError, match=r"be \(3, 8, 8\), which .* but got \(3, 12, 10\)"):
        trigger.build((3, 12, 10))
    assert trigger.image_shape is None
    assert trigger.triggers[0].image_shape is None


def test_refuses_an_image_that_a_part_does_not_fit() -> None:
    with pytest.raises(ValueError, match="`size` to be at most the image's 2 x 2 pixels"):
        SequentialTrigger([SIG(), BadNets()]).build((1, 2, 2))


@pytest.mark.parametrize("parts", [[], [SIG(), "BadNets"], SIG(), [None]])
def test_refuses_what_is_no_trigger(parts: list[Trigger]) -> None:
    with pytest.raises(ValueError, match="`triggers` to be at least one trigger, but got "):
        SequentialTrigger(parts)
