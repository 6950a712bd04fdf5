"""BadNets against patches written by hand."""

from typing import Literal

import pytest
import torch

from lightning_bd.triggers import BadNets
from lightning_bd.triggers.badnets import Position


@pytest.mark.parametrize(
    ("size", "position", "margin", "row", "column"),
    [
        (3, "bottom_right", 0, 7, 5),
        (3, "bottom_right", 2, 5, 3),
        (3, "bottom_left", 1, 6, 1),
        (3, "top_right", 1, 1, 4),
        (3, "top_left", 0, 0, 0),
        (3, "top_left", 5, 5, 5),
        ((2, 4), "center", 0, 4, 2),
        ((2, 4), (3, 1), 0, 3, 1),
        ((10, 8), "bottom_right", 0, 0, 0),
    ],
)
def test_exactly_the_patch_changes(
    size: int | tuple[int, int], position: Position | tuple[int, int], margin: int, row: int, column: int
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    # 2 is a value that no patch has, so that every replaced pixel shows.
    images = torch.full((5, 3, 10, 8), 2.0)
    triggered = BadNets(size, position, margin=margin)(images)
    inside = torch.zeros(10, 8, dtype=torch.bool)
    inside[row : row + height, column : column + width] = True
    assert torch.equal(triggered != images, inside.expand(5, 3, -1, -1))


def test_random_patch_is_the_sigmoid_of_a_seeded_normal() -> None:
    normal = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(11))
    triggered = BadNets(size=(2, 4), position="top_left", seed=11)(torch.zeros(1, 3, 6, 6))
    torch.testing.assert_close(triggered[0, :, :2, :4], 1 / (1 + torch.exp(-normal)))
    assert not torch.equal(triggered, BadNets(size=(2, 4), position="top_left", seed=12)(torch.zeros(1, 3, 6, 6)))


@pytest.mark.parametrize(
    ("pattern", "patch"),
    [
        ("white", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("black", [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ("checkerboard", [[1, 0, 1], [0, 1, 0], [1, 0, 1]]),
    ],
)
def test_drawn_patterns(pattern: Literal["white", "black", "checkerboard"], patch: list[list[int]]) -> None:
    triggered = BadNets(pattern=pattern)(torch.full((2, 3, 5, 5), 0.5))
    assert torch.equal(triggered[:, :, 2:, 2:], torch.tensor(patch, dtype=torch.float32).expand(2, 3, 3, 3))


def test_color_overrides_the_pattern() -> None:
    triggered = BadNets(size=2, color=(1.0, 0.25, 0.0), pattern="white")(torch.full((2, 3, 4, 4), 0.5))
    for channel, value in enumerate((1.0, 0.25, 0.0)):
        assert (triggered[:, channel, 2:, 2:] == value).all()


@pytest.mark.parametrize("size", [0, -2, (3, 0), (1, 2, 3), (2.0, 2)])
def test_refuses_size(size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"`size` to be a positive integer or two of them, but got "):
        BadNets(size=size)


@pytest.mark.parametrize("position", ["middle", (-1, 0), (1, 2, 3)])
def test_refuses_position(position: Position) -> None:
    with pytest.raises(ValueError, match=r"`position` to be one of .*'center'\) or a non-negative .* but got "):
        BadNets(position=position)


def test_refuses_pattern() -> None:
    with pytest.raises(ValueError, match=r"`pattern` to be one of \('random', .* but got 'grey'"):
        BadNets(pattern="grey")  # type: ignore[arg-type]


@pytest.mark.parametrize("color", [(), (0.0, 1.5, 0.0), (float("nan"),)])
def test_refuses_color(color: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"`color` to be values in \[0, 1\], one per channel, but got \("):
        BadNets(color=color)


def test_refuses_margin() -> None:
    with pytest.raises(ValueError, match="`margin` to be a non-negative integer, but got -1"):
        BadNets(margin=-1)


@pytest.mark.parametrize("position", ["center", (1, 1)])
def test_refuses_margin_without_a_corner(position: Position | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="`margin` to be 0 where `position` is not a corner, but got 2"):
        BadNets(position=position, margin=2)


@pytest.mark.parametrize("size", [(5, 3), (3, 7)])
def test_refuses_a_patch_larger_than_the_image(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"`size` to be at most the image's 4 x 6 pixels, but got {size[0]} x "):
        BadNets(size=size).build((3, 4, 6))


@pytest.mark.parametrize(
    ("trigger", "place"),
    [
        (BadNets(position=(2, 0)), "row 2, column 0"),
        (BadNets(position=(0, 4)), "row 0, column 4"),
        (BadNets(margin=2), "row -1, column 1"),
        (BadNets(position="top_left", margin=2), "row 2, column 2"),
    ],
)
def test_refuses_a_patch_outside_the_image(trigger: BadNets, place: str) -> None:
    with pytest.raises(ValueError, match=rf"inside the image's 4 x 6 pixels, but .* 3 x 3 pixels at {place}"):
        trigger.build((3, 4, 6))


def test_refuses_a_color_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"one value per channel, 1 for images of shape \(1, 8, 8\), but got 3"):
        BadNets(color=(0.0, 0.0, 1.0)).build((1, 8, 8))
