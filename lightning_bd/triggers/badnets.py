"""BadNets: a small patch at a fixed place."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("BadNets",)

Position = Literal["bottom_right", "bottom_left", "top_right", "top_left", "center"]
Pattern = Literal["random", "white", "black", "checkerboard"]


class BadNets(Trigger):
    """Replace the pixels of a small rectangle by a fixed patch.

    The trigger of `Gu et al., 2017 <https://arxiv.org/abs/1708.06733>`_. The default is the patch of
    `SBL <https://arxiv.org/abs/2407.14738>`_'s released code: 3 x 3, bottom right, the sigmoid of a standard normal
    draw per pixel and channel. ``pattern="white"`` or ``"checkerboard"`` give the field's other usual patches.

    Args:
        size: Side of the square patch, or (height, width), in pixels; at least 1.
        position: Corner or ``"center"``, or (row, column) of the patch's top left pixel, counted from 0.
        pattern: ``"random"`` (drawn from ``seed``), ``"white"``, ``"black"`` or ``"checkerboard"`` (white first).
        color: One solid colour in place of ``pattern``: a value in [0, 1] per channel.
        margin: Distance from the named corner to the image's border, in pixels; at least 0.
        seed: Seed of the random pattern; no other pattern uses it.

    Raises:
        ValueError: If an argument is out of its range; when built, if the patch does not lie inside the image or
            ``color`` has not one value per channel.

    Example:
        >>> trigger = BadNets(size=2, pattern="checkerboard", margin=1)
        >>> trigger(torch.zeros(1, 1, 4, 4))[0, 0]
        tensor([[0., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 0., 0., 0.]])
    """

    pattern_values: Tensor

    def __init__(
        self,
        size: int | tuple[int, int] = 3,
        position: Position | tuple[int, int] = "bottom_right",
        pattern: Pattern = "random",
        color: tuple[float, ...] | None = None,
        margin: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not _are_integers((size, size) if isinstance(size, int) else size, minimum=1):
            raise ValueError(f"Expected argument `size` to be a positive integer or two of them, but got {size}.")
        if position not in get_args(Position) and (isinstance(position, str) or not _are_integers(position, minimum=0)):
            raise ValueError(
                f"Expected argument `position` to be one of {get_args(Position)} or a non-negative (row, column), "
                f"but got {position!r}."
            )
        if pattern not in get_args(Pattern):
            raise ValueError(f"Expected argument `pattern` to be one of {get_args(Pattern)}, but got {pattern!r}.")
        if color is not None and (len(color) == 0 or not all(0 <= value <= 1 for value in color)):
            raise ValueError(f"Expected argument `color` to be values in [0, 1], one per channel, but got {color}.")
        if margin < 0:
            raise ValueError(f"Expected argument `margin` to be a non-negative integer, but got {margin}.")
        if margin and (position == "center" or not isinstance(position, str)):
            raise ValueError(f"Expected argument `margin` to be 0 where `position` is not a corner, but got {margin}.")
        self.size = size if isinstance(size, int) else (size[0], size[1])
        self.position = position if isinstance(position, str) else (position[0], position[1])
        self.pattern = pattern
        self.color = None if color is None else tuple(color)
        self.margin = margin
        self.seed = seed

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        channels, image_height, image_width = image_shape
        height, width = self._patch_size()
        if height > image_height or width > image_width:
            raise ValueError(
                f"Expected argument `size` to be at most the image's {image_height} x {image_width} pixels, "
                f"but got {height} x {width}."
            )
        top, left = self._corner(image_shape)
        if top < 0 or left < 0 or top + height > image_height or left + width > image_width:
            raise ValueError(
                f"Expected the patch to lie inside the image's {image_height} x {image_width} pixels, but "
                f"position={self.position!r} and margin={self.margin} put its {height} x {width} pixels at "
                f"row {top}, column {left}."
            )
        if self.color is not None and len(self.color) != channels:
            raise ValueError(
                f"Expected argument `color` to have one value per channel, {channels} for images of shape "
                f"{image_shape}, but got {len(self.color)}."
            )
        return {"pattern_values": TensorSpec((channels, height, width), 0.0, 1.0)}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        shape = (image_shape[0], *self._patch_size())
        values = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if self.color is not None:
            values += torch.tensor(self.color, dtype=torch.float32, device="cpu").view(-1, 1, 1)
        elif self.pattern == "white":
            values += 1
        elif self.pattern == "checkerboard":
            values[:, ::2, ::2] = 1
            values[:, 1::2, 1::2] = 1
        elif self.pattern == "random":
            generator = torch.Generator().manual_seed(self.seed)
            values.normal_(generator=generator).sigmoid_()
        return {"pattern_values": values}

    def _transform(self, images: Tensor) -> Tensor:
        assert self.image_shape is not None
        top, left = self._corner(self.image_shape)
        height, width = self._patch_size()
        triggered = images.clone()
        triggered[:, :, top : top + height, left : left + width] = self.pattern_values
        return triggered

    def _patch_size(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _corner(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        if not isinstance(self.position, str):
            return self.position
        rows, columns = (image_shape[1] - self._patch_size()[0], image_shape[2] - self._patch_size()[1])
        if self.position == "center":
            return rows // 2, columns // 2
        top = self.margin if self.position.startswith("top") else rows - self.margin
        left = self.margin if self.position.endswith("left") else columns - self.margin
        return top, left


def _are_integers(pair: Sequence[int], minimum: int) -> bool:
    return len(pair) == 2 and all(isinstance(value, int) and value >= minimum for value in pair)
