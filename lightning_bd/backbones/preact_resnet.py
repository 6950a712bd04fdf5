"""Pre-activation residual networks for small images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bd.backbones._common import check_positive, conv, initialize_convolutions

__all__ = ("preact_resnet18", "preact_resnet34")


def preact_resnet18(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build the pre-activation ResNet-18 with a 3x3 stem of stride 1 and no max pooling.

    Normalisation and ReLU stand before each convolution
    (`He et al., 2016 <https://arxiv.org/abs/1603.05027>`_); 11,172,170 parameters for 10 classes. As in the paper, the
    first block of each stage shares its first activation with the shortcut, and the last stage is followed by a
    normalisation and a ReLU; many releases of backdoor papers leave the latter out and have 1,024 parameters fewer.
    Images ``(B, in_channels, H, W)`` of any size from 8x8 become logits ``(B, num_classes)``; the stages are ``layer1``
    to ``layer4``.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first stage (paper: 64), doubled at each of the next three.

    Raises:
        ValueError: If an argument is not a positive integer.

    Example:
        >>> import torch
        >>> model = preact_resnet18(num_classes=10, width=8)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    return PreActResNet(num_classes, in_channels, width, (width, 2 * width, 4 * width, 8 * width), (2, 2, 2, 2))


def preact_resnet34(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Build the pre-activation ResNet-34 with a 3x3 stem of stride 1 and no max pooling.

    As `preact_resnet18` with 3, 4, 6 and 3 blocks (`He et al., 2016 <https://arxiv.org/abs/1603.05027>`_); 21,280,330
    parameters for 10 classes.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images, at least 1.
        width: Channels of the first stage (paper: 64), doubled at each of the next three.

    Raises:
        ValueError: If an argument is not a positive integer.

    Example:
        >>> import torch
        >>> model = preact_resnet34(num_classes=10, width=8)
        >>> model(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    return PreActResNet(num_classes, in_channels, width, (width, 2 * width, 4 * width, 8 * width), (3, 4, 6, 3))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, beside a shortcut.

    With ``shared`` the shortcut starts after the first normalisation and ReLU instead of before them.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, shared: bool, dropout: float) -> None:
        super().__init__()
        self.shared = shared
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(channels, channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = conv(in_channels, channels, kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``, of any sign."""
        out = F.relu(self.bn1(x))
        shortcut = self.downsample(out if self.shared else x)
        out = self.conv1(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))
        # `+=` would overwrite the output of conv2, which per-sample gradients hook.
        total: Tensor = out + shortcut
        return total


class PreActResNet(nn.Module):
    """The module behind the pre-activation and the wide residual networks."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stem_width: int,
        widths: Sequence[int],
        depths: Sequence[int],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, stem_width)
        self.stage_names = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
        channels = stem_width
        for name, width, depth in zip(self.stage_names, widths, depths, strict=True):
            stage = nn.Sequential()
            for index in range(depth):
                stride = 2 if index == 0 and name != "layer1" else 1
                stage.append(PreActBlock(channels, width, stride, shared=index == 0, dropout=dropout))
                channels = width
            self.add_module(name, stage)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        x = self.conv1(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(F.relu(self.bn(x)).mean(dim=(2, 3)))
        return logits
