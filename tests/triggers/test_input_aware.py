"""The input-aware trigger against its formulas."""

import torch

from lightning_bd.triggers import InputAwareTrigger

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trigger_of(seed: int = 2) -> InputAwareTrigger:
    trigger = InputAwareTrigger(width=4, seed=seed)
    trigger.build((3, 8, 8))
    return trigger


def test_masked_pixels_are_replaced_by_the_pattern() -> None:
    trigger = trigger_of()
    networks = dict(trigger.network.named_children())
    # As in the released code: tanh to [0, 1], then a steep tanh around 0.5.
    mask = torch.tanh((torch.tanh(networks["mask"](IMAGES)) / 2 + 0.5) * 20 - 10) / 2 + 0.5
    pattern = torch.tanh(networks["pattern"](IMAGES)) / 2 + 0.5
    assert mask.shape == (6, 1, 8, 8)
    assert torch.allclose(trigger.mask(IMAGES), mask, atol=1e-5)
    assert torch.allclose(trigger(IMAGES), IMAGES * (1 - mask) + pattern * mask, atol=1e-5)


def test_another_images_trigger_can_be_put_on() -> None:
    trigger = trigger_of()
    others = IMAGES.roll(1, 0)
    mask, pattern = trigger.mask(others), trigger.pattern(others)
    assert torch.allclose(trigger.put(IMAGES, others), IMAGES * (1 - mask) + pattern * mask, atol=1e-5)
    assert not torch.allclose(trigger.put(IMAGES, others), trigger(IMAGES), atol=1e-2)


def test_a_cover_is_another_images_trigger_and_is_drawn_per_image() -> None:
    trigger = trigger_of()
    covers = trigger.cover(IMAGES, torch.Generator().manual_seed(3))
    assert torch.equal(covers, trigger.cover(IMAGES, torch.Generator().manual_seed(3)))
    assert not torch.equal(covers, trigger.cover(IMAGES, torch.Generator().manual_seed(4)))
    assert not torch.allclose(covers, trigger(IMAGES), atol=1e-2)
    generator = torch.Generator().manual_seed(3)
    down, right = (torch.randint(8, (6,), generator=generator) for _ in range(2))
    shifted = torch.stack(
        [image.flip(2).roll((int(i), int(j)), (1, 2)) for image, i, j in zip(IMAGES, down, right, strict=True)]
    )
    assert torch.allclose(covers, trigger.put(IMAGES, shifted), atol=1e-6)
    assert trigger.cover(IMAGES[:0]).shape == (0, 3, 8, 8)


def test_the_mask_is_known_to_be_untrained() -> None:
    trigger = trigger_of()
    assert trigger.has_initial_mask()
    with torch.no_grad():
        next(trigger.part("pattern").parameters()).add_(1)
    assert trigger.has_initial_mask()
    with torch.no_grad():
        next(trigger.part("mask").parameters()).add_(1e-3)
    assert not trigger.has_initial_mask()
