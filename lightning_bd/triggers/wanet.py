"""WaNet: a smooth, almost invisible warp."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("WaNet",)


class WaNet(Trigger):
    """Warp the image by a fixed smooth field of displacements.

    The trigger of `Nguyen and Tran, 2021 <https://arxiv.org/abs/2102.10369>`_: displacements drawn uniformly from
    [-1, 1] on a coarse grid, divided by their mean absolute value, upsampled by bicubic interpolation, scaled by
    ``strength / H`` and added to the identity in ``grid_sample``'s coordinates; pixels are read bilinearly.
    Its cover samples (the paper's noise mode) are read at the warped positions plus noise, drawn per image and pixel.

    Args:
        grid_size: Points of the coarse grid along each side, at least 1; the paper's ``k``, 4 for images of 32 pixels.
        strength: Mean size of a displacement, at least 0; the paper's ``s``, 0.5. One unit is half a pixel.
        seed: Seed of the field.
        grid_rescale: Factor on the positions that are read, in (0, 1]; 1 in the paper. Less keeps them off the border.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> trigger = WaNet(seed=1)
        >>> images = torch.eye(32).expand(2, 3, 32, 32)
        >>> warped = trigger(images)
        >>> bool((warped - images).abs().mean() < 0.05)
        True
        >>> noisy = trigger.cover(images, torch.Generator().manual_seed(0))
        >>> torch.equal(noisy[0], noisy[1])
        False
    """

    grid: Tensor

    def __init__(self, grid_size: int = 4, strength: float = 0.5, seed: int = 0, grid_rescale: float = 1.0) -> None:
        super().__init__()
        if not isinstance(grid_size, int) or grid_size < 1:
            raise ValueError(f"Expected argument `grid_size` to be a positive integer, but got {grid_size}.")
        if not 0 <= strength < math.inf:
            raise ValueError(f"Expected argument `strength` to be a non-negative float, but got {strength}.")
        if not 0 < grid_rescale <= 1:
            raise ValueError(f"Expected argument `grid_rescale` to be a float in (0, 1], but got {grid_rescale}.")
        self.grid_size = grid_size
        self.strength = strength
        self.seed = seed
        self.grid_rescale = grid_rescale

    def cover(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Warp images with noise of their own on top of the field: the paper's noise mode.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.
            generator: CPU generator of the noise; ``None`` is torch's global one.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        batch, _, height, width = images.shape
        noise = torch.rand((batch, height, width, 2), generator=generator, dtype=torch.float32, device="cpu")
        noise = noise.mul_(2).sub_(1).div_(height).to(images.device)
        return _warp(images, noise.add_(self.grid.to(images.device)).clamp_(-1, 1))

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {"grid": TensorSpec((image_shape[1], image_shape[2], 2), -1.0, 1.0)}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        _, height, width = image_shape
        generator = torch.Generator().manual_seed(self.seed)
        shape = (1, 2, self.grid_size, self.grid_size)
        coarse = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
        coarse = coarse / coarse.abs().mean()
        field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        rows = torch.linspace(-1, 1, height, dtype=torch.float32, device="cpu")
        columns = torch.linspace(-1, 1, width, dtype=torch.float32, device="cpu")
        # grid_sample reads (x, y).
        identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        grid = (identity + self.strength * field / height) * self.grid_rescale
        return {"grid": grid.clamp(-1, 1).contiguous()}

    def _transform(self, images: Tensor) -> Tensor:
        # One grid for all planes: where a pixel is read is worked out once per group of planes, not once per image.
        count, (height, width) = images.shape[0] * images.shape[1], images.shape[2:]
        groups = count // _group_size(count) if images.device.type == "cpu" else len(images)
        planes = images.reshape(groups, -1, height, width) if groups else images
        return _warp(planes, self.grid.to(images.device).expand(groups, -1, -1, -1)).view(images.shape)


def _group_size(planes: int) -> int:
    """Return the largest divisor up to 16, so that groups are of one size and threads have several each."""
    return max(size for size in range(1, 17) if planes % size == 0)


def _warp(images: Tensor, grid: Tensor) -> Tensor:
    # Half precision cannot hold positions in a large image, and the CPU has no such kernel.
    dtype = torch.promote_types(images.dtype, grid.dtype)
    warped = F.grid_sample(images.to(dtype), grid.to(dtype), align_corners=True)
    # The four bilinear weights may add up to a little more than 1.
    return warped.clamp_(0, 1).to(images.dtype)
