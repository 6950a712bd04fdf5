"""Random crop and mirror of a whole batch of stored images."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ("crop_and_flip", "mirror")


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor | None, padding: int) -> Tensor:
    """Pad with zeros, cut a window at each image's own offset and mirror some.

    Equals torchvision's ``RandomCrop(H, padding)`` followed by ``RandomHorizontalFlip`` for the same draws.

    Args:
        images: ``(B, C, H, W)`` uint8.
        offsets: ``(B, 2)`` int64 in [0, 2 * padding], row and column of the window in the padded image.
        flips: ``(B,)`` bool, which windows are mirrored left to right, or ``None`` for none.
        padding: Pixels added on each side.

    Returns:
        ``(B, C, H, W)`` uint8.

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
        >>> crop_and_flip(image, torch.tensor([[1, 2]]), torch.tensor([True]), padding=1)
        tensor([[[[0, 2],
                  [0, 4]]]], dtype=torch.uint8)
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    line, plane = padded.shape[3], padded.shape[2] * padded.shape[3]
    # Where each row of each window starts in the flattened batch; a row is then one block of `width` bytes. Selecting
    # blocks is several times faster than gathering pixels.
    planes = torch.arange(0, batch * channels * plane, plane, device=images.device).view(batch, channels, 1)
    rows = torch.arange(0, height * line, line, device=images.device)
    starts = planes + rows + (offsets[:, 0] * line + offsets[:, 1]).view(batch, 1, 1)
    windows = padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view(images.shape)
    return windows if flips is None else mirror(windows, flips)


def mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror some images of a batch left to right.

    Args:
        images: ``(B, C, H, W)``.
        flips: ``(B,)`` bool, which ones.

    Returns:
        ``(B, C, H, W)``, a new tensor.

    Example:
        >>> mirror(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([False, True])).flatten().tolist()
        [1, 2, 4, 3]
    """
    batch = len(images)
    rows = torch.arange(batch, device=images.device).add_(flips, alpha=batch)
    return torch.cat([images, images.flip(3)]).index_select(0, rows)
