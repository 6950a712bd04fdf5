"""VGG networks with batch normalisation for small images."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_bd.backbones._common import check_positive, initialize_convolutions

__all__ = ("vgg11_bn", "vgg16_bn")


def vgg11_bn(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build VGG-11 with batch normalisation and one linear layer after the mean over space.

    The convolutions of configuration A of `Simonyan and Zisserman, 2015 <https://arxiv.org/abs/1409.1556>`_, with
    torchvision's parameter names; the two hidden linear layers of the paper are left out, as is usual for small images;
    9,231,114 parameters for 10 classes. Images ``(B, in_channels, H, W)`` become logits ``(B, num_classes)``. Meant for
    32x32 and larger: the five poolings round odd sizes up, so that smaller images work too, with less and less space
    left to see.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first convolution (paper: 64); the last ones, and with them the features, have eight
            times as many.

    Raises:
        ValueError: If an argument is not a positive integer.

    Example:
        >>> import torch
        >>> model = vgg11_bn(num_classes=10, width=8)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    return VGG(num_classes, in_channels, width, depths=(1, 1, 2, 2, 2))


def vgg16_bn(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build VGG-16 with batch normalisation and one linear layer after the mean over space.

    As `vgg11_bn` with the convolutions of configuration D
    (`Simonyan and Zisserman, 2015 <https://arxiv.org/abs/1409.1556>`_); 14,728,266 parameters for 10 classes.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first convolution (paper: 64); the last ones, and with them the features, have eight
            times as many.

    Raises:
        ValueError: If an argument is not a positive integer.

    Example:
        >>> import torch
        >>> model = vgg16_bn(num_classes=10, width=8)
        >>> model(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    return VGG(num_classes, in_channels, width, depths=(2, 2, 3, 3, 3))


class VGG(nn.Module):
    """The module that the functions of this file return."""

    def __init__(self, num_classes: int, in_channels: int, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for factor, depth in zip((1, 2, 4, 8, 8), depths, strict=True):
            for _ in range(depth):
                # The bias does nothing before the normalisation; it keeps torchvision's weights loadable.
                self.features.append(nn.Conv2d(channels, factor * width, kernel_size=3, padding=1))
                self.features.append(nn.BatchNorm2d(factor * width))
                self.features.append(nn.ReLU())
                channels = factor * width
            self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        logits: Tensor = self.fc(self.features(x).mean(dim=(2, 3)))
        return logits
