"""Random views of images, for learning without labels."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ("augmented_view",)

#: Weights of red, green and blue in the brightness of a pixel.
_GREY = (0.299, 0.587, 0.114)
#: From RGB to brightness and two axes of colour, which a change of hue turns.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def augmented_view(
    images: Tensor, generator: torch.Generator, smallest_crop: float = 0.08, strength: float = 0.5
) -> Tensor:
    """Return a random view of each image, by the augmentations of `SimCLR <https://arxiv.org/abs/2002.05709>`_.

    A crop of random area and shape, resized to the whole image, mirrored with probability 0.5; with probability 0.8
    brightness, contrast, saturation and hue jittered; with probability 0.2 all grey. As in the paper for CIFAR-10 there
    is no blur. Images that have not 3 channels keep their colours: brightness and contrast alone are jittered.

    Differs from the paper's in what lets a whole batch be made at once: the four jitters come in this order instead of
    a random one, a hue is turned in the YIQ colour space, a side of a crop that would be longer than the image is cut.

    Args:
        images: ``(B, C, H, W)`` float in [0, 1].
        generator: On the CPU; all that is random is drawn from it.
        smallest_crop: Smallest share of the image's area that a crop has, in (0, 1]; the paper's 0.08.
        strength: Of the jitter: brightness, contrast and saturation change by up to ``0.8 * strength``, hues by
            ``0.2 * strength`` of the circle; the paper's 1.0, for CIFAR-10 0.5.

    Returns:
        ``(B, C, H, W)`` in [0, 1].

    Example:
        >>> images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> views = [augmented_view(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        >>> torch.equal(views[0], views[1]), torch.equal(views[0], views[2])
        (True, False)
    """
    # The same number of draws for each image, whatever becomes of them.
    draws = torch.rand(11, len(images), generator=generator).to(images)
    cropped = _crop(images, draws[:5], smallest_crop)
    return _colour(cropped, draws[5:], strength)


def _crop(images: Tensor, draws: Tensor, smallest: float) -> Tensor:
    area = smallest + (1 - smallest) * draws[0]
    # Width by height, between 3/4 and 4/3.
    shape = torch.exp((2 * draws[1] - 1) * math.log(4 / 3))
    width, height = ((area * ratio).sqrt().clamp_max(1) for ratio in (shape, 1 / shape))
    mirrored = torch.where(draws[4] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    # From the view's coordinates to the image's, both in [-1, 1].
    rows = (width * mirrored, zero, (1 - width) * (2 * draws[2] - 1), zero, height, (1 - height) * (2 * draws[3] - 1))
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _colour(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    signs = (2 * draws[:4] - 1) * (draws[4] < 0.8)
    # A factor is never negative.
    factors = (1 + 0.8 * strength * signs[:3]).clamp_min(0)[:, :, None, None, None]
    views = (images * factors[0]).clamp(0, 1)
    mean = _grey(views).mean(dim=(1, 2, 3), keepdim=True)
    views = (mean + factors[1] * (views - mean)).clamp(0, 1)
    if images.shape[1] != 3:
        return views
    views = torch.lerp(_grey(views), views, factors[2]).clamp(0, 1)
    views = torch.einsum("bij,bjhw->bihw", _turn(0.4 * math.pi * strength * signs[3]), views).clamp(0, 1)
    return torch.where((draws[5] < 0.2)[:, None, None, None], _grey(views), views)


def _grey(images: Tensor) -> Tensor:
    """Return the brightness ``(B, 1, H, W)``."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    return torch.einsum("j,bjhw->bhw", images.new_tensor(_GREY), images)[:, None]


def _turn(angles: Tensor) -> Tensor:
    """Return the matrices ``(B, 3, 3)`` that turn hues by angles ``(B,)``."""
    axes = angles.new_tensor(_YIQ)
    one, zero, cos, sin = torch.ones_like(angles), torch.zeros_like(angles), angles.cos(), angles.sin()
    rows = (one, zero, zero, zero, cos, -sin, zero, sin, cos)
    turned = torch.stack(rows, dim=1).view(-1, 3, 3)
    # Solving on the CPU: a 3 x 3 inverse is not worth a library on an accelerator.
    back: Tensor = torch.linalg.inv(axes.cpu())
    return back.to(axes) @ turned @ axes
