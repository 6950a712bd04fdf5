"""Residual networks for small images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bd.backbones._common import check_positive, conv, initialize_convolutions

__all__ = ("resnet18", "resnet20", "resnet34")


def resnet18(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build ResNet-18 with a stem for small images: a 3x3 convolution of stride 1 and no max pooling.

    Blocks, depths and 1x1 projections as in `He et al., 2016 <https://arxiv.org/abs/1512.03385>`_; 11,173,962
    parameters for 10 classes. Parameter names are torchvision's. Images ``(B, in_channels, H, W)`` of any size from
    8x8 become logits ``(B, num_classes)``; the stages are ``layer1`` to ``layer4``.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first stage (paper: 64), doubled at each of the next three.

    Raises:
        ValueError: If an argument is not a positive integer.

    Example:
        >>> import torch
        >>> model = resnet18(num_classes=10, width=8)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    return ResNet(num_classes, in_channels, (width, 2 * width, 4 * width, 8 * width), depths=(2, 2, 2, 2))


def resnet34(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build ResNet-34 with a stem for small images: a 3x3 convolution of stride 1 and no max pooling.

    As `resnet18` with 3, 4, 6 and 3 blocks (`He et al., 2016 <https://arxiv.org/abs/1512.03385>`_); 21,282,122
    parameters for 10 classes.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first stage (paper: 64), doubled at each of the next three.

    Raises:
        ValueError: If an argument is not a positive integer.

    Example:
        >>> import torch
        >>> model = resnet34(num_classes=10, width=8)
        >>> model(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    return ResNet(num_classes, in_channels, (width, 2 * width, 4 * width, 8 * width), depths=(3, 4, 6, 3))


def resnet20(num_classes: int, in_channels: int = 3, width: int = 16) -> nn.Module:
    """Build the 20-layer ResNet that its paper designed for CIFAR-10.

    Three stages of three blocks; where the shape changes, the shortcut takes every second pixel and pads the missing
    channels with zeros, so that it has no parameters (option A of
    `He et al., 2016 <https://arxiv.org/abs/1512.03385>`_); 269,722 parameters for 10 classes. Images
    ``(B, in_channels, H, W)`` of any size from 8x8 become logits ``(B, num_classes)``; the stages are ``layer1`` to
    ``layer3``.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first stage (paper: 16), doubled at each of the next two.

    Raises:
        ValueError: If an argument is not a positive integer.

    Example:
        >>> import torch
        >>> model = resnet20(num_classes=10)
        >>> sum(parameter.numel() for parameter in model.parameters())
        269722
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    return ResNet(num_classes, in_channels, (width, 2 * width, 4 * width), depths=(3, 3, 3), projection=False)


class PaddedShortcut(nn.Module):
    """Subsample space and append channels of zeros: the shortcut without parameters."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C + extra_channels, ceil(H / stride), ceil(W / stride))``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module
        if stride == 1 and in_channels == channels:
            self.downsample = nn.Identity()
        elif projection:
            self.downsample = nn.Sequential(
                conv(in_channels, channels, kernel_size=1, stride=stride), nn.BatchNorm2d(channels)
            )
        else:
            self.downsample = PaddedShortcut(channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``, not negative."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # `+=` would overwrite the output of bn2, which per-sample gradients hook.
        return F.relu(out + self.downsample(x))


class ResNet(nn.Module):
    """The module that the functions of this file return."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        projection: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stage_names = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
        channels = widths[0]
        for name, width, depth in zip(self.stage_names, widths, depths, strict=True):
            stage = nn.Sequential()
            for index in range(depth):
                stride = 2 if index == 0 and name != "layer1" else 1
                stage.append(BasicBlock(channels, width, stride, projection))
                channels = width
            self.add_module(name, stage)
        self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
