"""Which images a selection takes, against sorting by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bd.selection import RandomSelection, SampleScorer, Selection
from lightning_bd.selection.base import Order


class Brightness(SampleScorer):
    """The mean of the pixels, divided by ``step`` and cut, so that there are ties."""

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        return images.double().mean(dim=(1, 2, 3)).div(self.step).floor()


class Fixed(SampleScorer):
    """Returns what it was given."""

    def __init__(self, result: Tensor) -> None:
        self.result = result

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        return self.result


#: Constant images of 20 values, in no order.
VALUES = torch.randperm(20, generator=torch.Generator().manual_seed(5)) * 10
IMAGES = VALUES.to(torch.uint8).view(20, 1, 1, 1).expand(20, 3, 2, 2)
LABELS = torch.zeros(20, dtype=torch.int64)


def chosen(selection: Selection, count: int, rows: Tensor | None = None, **more: Any) -> list[int]:
    """Return the values of the images that are chosen, sorted."""
    rows = torch.arange(20) if rows is None else rows
    found = selection.choose(IMAGES[rows], LABELS[rows], count, 0, **more)
    assert found.tolist() == sorted(set(found.tolist()))
    return sorted(VALUES[rows][found].tolist())


@pytest.mark.parametrize(
    ("order", "window", "expected"),
    [
        ("hardest", None, [170, 180, 190]),
        ("easiest", None, [0, 10, 20]),
        ("hardest", (40, 60), [90, 100, 110]),
        ("easiest", (40, 60), [80, 90, 100]),
        ("hardest", (0, 15), [0, 10, 20]),
        ("random", (0, 15), [0, 10, 20]),
        # 12 % of 20 images are 2.4: the third image, at 10 %, is inside, the fourth, at 15 %, is not.
        ("easiest", (0, 12), [0, 10, 20]),
    ],
)
def test_order_and_window(order: Order, window: tuple[float, float] | None, expected: list[int]) -> None:
    assert chosen(Selection(Brightness(), order, window), 3) == expected


def test_windows_side_by_side_share_the_images() -> None:
    edges = [0, 12, 33.3, 71, 100]
    parts = []
    for low, high in itertools.pairwise(edges):
        for count in range(20, 0, -1):
            try:
                parts += chosen(Selection(Brightness(), window=(low, high)), count)
                break
            except ValueError:
                continue
    assert sorted(parts) == sorted(VALUES.tolist())


@pytest.mark.parametrize("order", ["hardest", "random"])
def test_the_order_of_the_images_does_not_matter(order: Order) -> None:
    """With ties: scores 0 to 3, five images each."""
    selection = Selection(Brightness(step=50), order)
    first = chosen(selection, 7)
    for seed in range(3):
        rows = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        assert chosen(selection, 7, rows) == first
    if order == "hardest":
        assert first[2:] == [150, 160, 170, 180, 190]


def test_ties_and_random_order_follow_the_seed() -> None:
    for selection in (Selection(Brightness(step=1000)), Selection(Brightness(), "random")):
        assert len({tuple(chosen(selection, 5, seed=seed)) for seed in range(4)}) == 4
    assert len({tuple(chosen(Selection(Brightness()), 5, seed=seed)) for seed in range(4)}) == 1


def test_random_order_does_not_follow_the_ties() -> None:
    """With one score for all, the two draws would be the same if their keys were."""
    ties = chosen(Selection(Brightness(step=1000), "easiest"), 8)
    assert ties != chosen(Selection(Brightness(step=1000), "random"), 8)


def test_only_candidates_are_chosen() -> None:
    candidates = VALUES < 100
    assert chosen(Selection(Brightness()), 3, candidates=candidates) == [70, 80, 90]
    assert chosen(Selection(Brightness(), window=(0, 50)), 3, candidates=candidates) == [20, 30, 40]


def test_float_images_are_chosen_as_their_bytes() -> None:
    one = Selection(RandomSelection()).choose(IMAGES, LABELS, 5, 0)
    assert torch.equal(Selection(RandomSelection()).choose(IMAGES.float() / 255, LABELS, 5, 0), one)


def test_random_selection_is_uniform_and_of_the_image() -> None:
    pixels = torch.arange(4096, dtype=torch.int16).view(torch.uint8).view(4096, 1, 1, 2)
    labels = torch.zeros(4096, dtype=torch.int64)
    scores = RandomSelection().score(pixels, labels, 0)
    # Standard deviation of a bin of 10: sqrt(4096 * 0.1 * 0.9) = 19.
    counts = torch.histc(scores, 10, 0, 1)
    assert float((counts - 409.6).abs().max()) < 80
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RandomSelection().score(pixels[order], labels, 0), scores[order])
    other = RandomSelection(seed=1).score(pixels, labels, 0)
    assert abs(float(torch.corrcoef(torch.stack([scores, other]))[0, 1])) < 0.06


def test_the_global_random_state_is_not_used() -> None:
    state = torch.get_rng_state()
    first = chosen(Selection(RandomSelection(), "random"), 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    try:
        assert chosen(Selection(RandomSelection(seed=0), "random"), 4) == first
    finally:
        torch.set_rng_state(state)


def test_refuses_arguments() -> None:
    with pytest.raises(ValueError, match=r"`order` to be one of \('hardest', .*\), but got 'middle'"):
        Selection(Brightness(), "middle")  # type: ignore[arg-type]
    for window in ((-1.0, 5.0), (5.0, 5.0), (5.0, 101.0), (float("nan"), 5.0), (1.0,)):
        with pytest.raises(ValueError, match=r"`window` to be two increasing percentiles in \[0, 100\], but got \("):
            Selection(Brightness(), window=window)  # type: ignore[arg-type]


def test_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"at least 21 images to choose from, but there are 20. Lower `poison.rate`\."):
        chosen(Selection(Brightness()), 21)
    message = r"at least 5 images .* between the percentiles 0 and 20, but there are 4.*, or widen .* `window`"
    with pytest.raises(ValueError, match=message):
        chosen(Selection(Brightness(), window=(0, 20)), 5)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (torch.zeros(19), r"shape \(19,\)"),
        (torch.zeros(20, 1), r"shape \(20, 1\)"),
        (torch.full((20,), float("nan")), "values that are not finite"),
        (torch.full((20,), float("inf")), "values that are not finite"),
    ],
)
def test_refuses_what_is_no_score(result: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"`Fixed` to give one finite score for each of 20 images, got {problem}"):
        chosen(Selection(Fixed(result)), 3)


@pytest.mark.parametrize("images", [torch.zeros(2, 3), torch.zeros(2, 1, 2, 2, dtype=torch.int64)])
def test_refuses_what_are_no_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`images` to be \(N, C, H, W\), uint8 or floating-point in \[0, 1\]"):
        Selection(RandomSelection()).choose(images, torch.zeros(2, dtype=torch.int64), 1, 0)
