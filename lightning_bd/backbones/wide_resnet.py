"""Wide residual networks."""

from torch import nn

from lightning_bd.backbones._common import check_positive
from lightning_bd.backbones.preact_resnet import PreActResNet

__all__ = ("wide_resnet",)


def wide_resnet(
    num_classes: int, depth: int = 28, width_factor: int = 10, dropout: float = 0.0, in_channels: int = 3
) -> nn.Module:
    """Build a wide residual network WRN-depth-width_factor.

    Three stages of ``(depth - 4) / 6`` pre-activation blocks with 16, 32 and 64 times ``width_factor`` channels
    (`Zagoruyko and Komodakis, 2016 <https://arxiv.org/abs/1605.07146>`_); WRN-28-10 has 36,479,194 parameters for 10
    classes. Images ``(B, in_channels, H, W)`` of any size from 8x8 become logits ``(B, num_classes)``; the stages are
    ``layer1`` to ``layer3``.

    Args:
        num_classes: Number of classes, at least 1.
        depth: Number of convolutions, ``6 n + 4`` with n >= 1 (paper: 16 to 40).
        width_factor: Multiple of the channels of the thin network, at least 1 (paper: 1 to 12).
        dropout: Probability of dropping an activation between the two convolutions of a block, in [0, 1) (paper: 0 or
            0.3).
        in_channels: Channels of the images, at least 1.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> model = wide_resnet(num_classes=10, depth=10, width_factor=1)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, width_factor=width_factor, in_channels=in_channels)
    if depth < 10 or (depth - 4) % 6 != 0:
        raise ValueError(f"Expected argument `depth` to be 6 n + 4 with n >= 1 (10, 16, 22, ...), but got {depth}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"Expected argument `dropout` to be a probability in [0, 1), but got {dropout}.")
    widths = (16 * width_factor, 32 * width_factor, 64 * width_factor)
    blocks = (depth - 4) // 6
    return PreActResNet(num_classes, in_channels, 16, widths, (blocks, blocks, blocks), dropout)
