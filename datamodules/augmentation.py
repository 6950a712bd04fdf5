"""Random crop and mirror of a whole batch of stored images."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ("crop_and_flip",)


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
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if flips is not None:
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    columns = columns + offsets[:, 1:]
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    # One gather over flattened planes: about twice as fast as indexing windows of an unfolded view.
    positions = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    positions = positions.view(batch, 1, height * width).expand(batch, channels, height * width)
    planes = F.pad(images, (padding, padding, padding, padding)).view(batch, channels, -1)
    return planes.gather(2, positions).view(images.shape)
