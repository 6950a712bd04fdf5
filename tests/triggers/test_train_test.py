"""TrainTestTrigger: one way in training, another in the attack."""

import pytest
import torch
from torch import Tensor

from lightning_bd.triggers import SIG, Blended, BppAttack, TrainTestTrigger, Trigger, WaNet


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("training", "test"), [(Blended(0.1), Blended(0.3)), (SIG(0.1), SIG(0.2)), (WaNet(strength=0.2), WaNet(strength=2))]
)
def test_each_at_its_place(images: Tensor, training: Trigger, test: Trigger) -> None:
    before = images.clone()
    trigger = TrainTestTrigger(training, test)
    assert torch.equal(trigger(images), training(images))
    assert torch.equal(trigger.attack(images), test(images))
    assert not torch.equal(trigger(images), trigger.attack(images))
    assert torch.equal(images, before)


def test_cover_is_the_training_triggers(images: Tensor) -> None:
    covers = TrainTestTrigger(WaNet(), BppAttack()).cover(images, torch.Generator().manual_seed(2))
    assert torch.equal(covers, WaNet().cover(images, torch.Generator().manual_seed(2)))


def test_either_may_be_used_first(images: Tensor) -> None:
    for use in ("attack", "cover"):
        trigger = TrainTestTrigger(SIG(0.1), SIG(0.2))
        getattr(trigger, use)(images)
        assert trigger.image_shape == (3, 12, 10)
        assert list(trigger.state_dict()) == ["training_trigger.wave", "test_trigger.wave"]


def test_restored_triggers_keep_their_places(images: Tensor) -> None:
    trigger, twin = (TrainTestTrigger(Blended(0.1), Blended(0.3, "stripes")) for _ in range(2))
    trigger.build((3, 12, 10))
    twin.restore((3, 12, 10), trigger.state_dict())
    assert torch.equal(twin(images), trigger(images))
    assert torch.equal(twin.attack(images), trigger.attack(images))


def test_train_mode_changes_nothing(images: Tensor) -> None:
    """The place of an image decides, not the mode of a module."""
    trigger = TrainTestTrigger(SIG(0.1), SIG(0.2))
    assert torch.equal(trigger.train()(images), trigger.eval()(images))


def test_refuses_what_is_no_trigger() -> None:
    with pytest.raises(ValueError, match=r"`training_trigger` to be a trigger, but got 0\.1"):
        TrainTestTrigger(0.1, SIG())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`test_trigger` to be a trigger, but got None"):
        TrainTestTrigger(SIG(), None)  # type: ignore[arg-type]
