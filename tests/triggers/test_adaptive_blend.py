"""AdaptiveBlend against loops over images, pieces and pixels with Python's integers."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_bd.functional.draws import keyed_generator
from lightning_bd.triggers import AdaptiveBlend, Blended

PRIME = 2**31 - 1


def stored(count: int, shape: tuple[int, int, int] = (3, 13, 10), seed: int = 0) -> Tensor:
    """Images as they come from 8 bits."""
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed)).float() / 255


def shown_pieces(image: Tensor, side: int, hidden: int, seed: int) -> set[int]:
    """The pieces that one image gets, from the definition."""
    values = [round(value * 255) for value in image.double().flatten().tolist()]
    generator = keyed_generator(seed, "pieces")
    bound = min(PRIME, 2**53 // (255 * len(values)))
    multipliers = torch.randint(1, bound, (2, len(values)), generator=generator).tolist()
    mixers = torch.randint(1, PRIME, (3, side * side), generator=generator).tolist()
    first, second = (sum(m * v for m, v in zip(row, values, strict=True)) % PRIME for row in multipliers)
    numbers = [(a * first + b * second + c) % PRIME for a, b, c in zip(*mixers, strict=True)]
    ranked = sorted(range(side * side), key=lambda piece: numbers[piece])
    return set(ranked[hidden:])


@pytest.mark.parametrize(
    ("trigger", "side", "hidden"),
    [
        (AdaptiveBlend(pattern="noise"), 4, 8),
        (AdaptiveBlend(ratio=0.5, pieces=9, mask_rate=0.3, pattern="noise", seed=4), 3, 3),
        (AdaptiveBlend(ratio=1.0, pieces=4, mask_rate=0.0, pattern="noise", seed=5), 2, 0),
    ],
)
def test_formula(trigger: AdaptiveBlend, side: int, hidden: int) -> None:
    images = stored(6)
    triggered = trigger(images)
    picture = trigger.picture
    for image, found in zip(images, triggered, strict=True):
        shown = shown_pieces(image, side, hidden, trigger.seed)
        assert len(shown) == side * side - hidden
        for row in range(13):
            for column in range(10):
                old, piece = image[:, row, column], row * side // 13 * side + column * side // 10
                mixed = (1 - trigger.ratio) * old + trigger.ratio * picture[:, row, column]
                expected = mixed if piece in shown else old
                torch.testing.assert_close(found[:, row, column], expected, rtol=0, atol=1e-6)
                assert piece in shown or torch.equal(found[:, row, column], old)


def test_every_piece_and_pair_of_pieces_is_shown_equally_often() -> None:
    count = 20_000
    trigger = AdaptiveBlend(ratio=1.0, image=None, pattern="noise")
    images = stored(count, (1, 8, 8)) * 0
    # Differ in few pixels, as natural images of one kind do.
    images[:, 0, 0, :3] = stored(count, (1, 1, 3), seed=1)[:, 0, 0]
    changed = (trigger(images) != images)[:, 0, ::2, ::2].flatten(1).double()
    assert (changed.sum(dim=1) == 8).all()
    # Five standard deviations of a share of 20,000 independent draws.
    assert (changed.mean(dim=0) - 0.5).abs().max() < 5 * (0.25 / count) ** 0.5
    together = changed.t() @ changed / count
    for one, other in combinations(range(16), 2):
        share = 8 / 16 * 7 / 15
        assert abs(float(together[one, other]) - share) < 5 * (share * (1 - share) / count) ** 0.5
    assert len({tuple(row) for row in changed.tolist()}) > 8_000


def test_the_choice_is_the_images_alone() -> None:
    images = stored(8)
    trigger, other = AdaptiveBlend(ratio=0.5), AdaptiveBlend(ratio=0.5, seed=1)
    expected = trigger(images)
    assert torch.equal(trigger(images.flip(0)), expected.flip(0))
    assert torch.equal(trigger.cover(images), expected)
    assert not torch.equal(other(images), expected)
    assert not torch.equal(other(images) == images, expected == images)
    # Less than half a level: the same image once it is stored.
    moved = (images + 0.4 / 255).clamp(max=1)
    assert torch.equal(trigger(moved) == moved, expected == images)


def test_large_images_are_exact() -> None:
    images = stored(2, (3, 128, 160))
    trigger = AdaptiveBlend(ratio=0.5, pattern="noise")
    changed = (trigger(images) != images).any(dim=1).unflatten(1, (4, 32)).unflatten(3, (4, 40)).any(dim=4).any(dim=2)
    for image, pieces in zip(images, changed.flatten(1).tolist(), strict=True):
        assert {piece for piece, shown in enumerate(pieces) if shown} == shown_pieces(image, 4, 8, 0)


def test_the_attack_shows_all_of_it() -> None:
    images = stored(5)
    trigger = AdaptiveBlend(test_ratio=0.3, pattern="stripes")
    attacked = trigger.attack(images)
    assert torch.equal(attacked, Blended(0.3, "stripes")(images))
    assert (attacked != images).float().mean() > 0.99


def test_without_a_mask_it_is_blended() -> None:
    images = stored(5)
    trigger = AdaptiveBlend(ratio=0.2, mask_rate=0.0)
    torch.testing.assert_close(trigger(images), Blended(0.2)(images), rtol=0, atol=1e-7)


def test_images_are_differentiable() -> None:
    images = stored(2).requires_grad_()
    (gradient,) = torch.autograd.grad(AdaptiveBlend(ratio=0.25)(images).sum(), images)
    assert torch.unique(gradient).tolist() == [0.75, 1.0]


def test_built_while_validating_it_is_of_use_in_training() -> None:
    trigger, images = AdaptiveBlend(), stored(2)
    with torch.inference_mode():
        expected = trigger(images)
    assert torch.equal(trigger(images.requires_grad_()).detach(), expected)
    assert not any(buffer.is_inference() for buffer in trigger.buffers())


def test_only_the_picture_is_saved() -> None:
    trigger, images = AdaptiveBlend(seed=3), stored(3)
    expected = trigger(images)
    assert list(trigger.state_dict()) == ["picture"]
    restored = AdaptiveBlend(seed=3)
    restored.restore((3, 13, 10), trigger.state_dict())
    assert torch.equal(restored(images), expected)


def test_a_picture_of_ones_own(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    trigger = AdaptiveBlend(test_ratio=1.0, image=tmp_path / "picture.png")
    assert torch.equal(trigger.attack(stored(1))[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan")])
def test_refuses_ratios(value: float) -> None:
    with pytest.raises(ValueError, match=r"`ratio` to be a float in \(0, 1\], but got "):
        AdaptiveBlend(ratio=value)
    with pytest.raises(ValueError, match=r"`test_ratio` to be a float in \(0, 1\], but got "):
        AdaptiveBlend(test_ratio=value)


@pytest.mark.parametrize("pieces", [0, -4, 8, 16.0])
def test_refuses_pieces(pieces: int) -> None:
    with pytest.raises(ValueError, match="`pieces` to be a square number such as 16, but got "):
        AdaptiveBlend(pieces=pieces)


@pytest.mark.parametrize(("mask_rate", "pieces"), [(-0.1, 16), (1.0, 16), (0.98, 16), (0.6, 1), (float("nan"), 16)])
def test_refuses_mask_rate(mask_rate: float, pieces: int) -> None:
    with pytest.raises(ValueError, match=rf"leaves at least one of {pieces} pieces, but got "):
        AdaptiveBlend(mask_rate=mask_rate, pieces=pieces)


def test_refuses_pattern() -> None:
    with pytest.raises(ValueError, match=r"`pattern` to be one of \('waves', .* but got 'kitty'"):
        AdaptiveBlend(pattern="kitty")  # type: ignore[arg-type]


def test_refuses_more_pieces_than_pixels() -> None:
    with pytest.raises(ValueError, match=r"`pieces` to be at most 5 x 5 .* images of shape \(3, 4, 10\)"):
        AdaptiveBlend(pieces=25).build((3, 4, 10))
