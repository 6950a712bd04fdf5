"""Pieces that the backbones share."""

from torch import nn

__all__ = ("check_positive", "conv", "initialize_convolutions")


def check_positive(**arguments: int) -> None:
    """Refuse the first argument that is not a positive integer.

    Args:
        **arguments: The values by their public names.

    Raises:
        ValueError: If a value is smaller than one or not an integer.

    Example:
        >>> check_positive(width=64)
        >>> check_positive(width=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `width` to be a positive integer, but got 0.
    """
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Build a convolution without bias whose padding keeps the size at stride 1.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel in pixels, odd.
        stride: Step in pixels.

    Example:
        >>> conv(3, 8).padding, conv(3, 8, kernel_size=1).padding
        ((1, 1), (0, 0))
    """
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


def initialize_convolutions(model: nn.Module) -> None:
    """Draw the convolution weights of ``model`` from the normal distribution of He et al. and set their biases to zero.

    The variance is ``2 / (kernel height * kernel width * output channels)``, the form for rectified networks that keeps
    the scale of the gradients (`He et al., 2015 <https://arxiv.org/abs/1502.01852>`_). Other layers are left as they
    are.

    Args:
        model: The network, changed in place.

    Example:
        >>> layer = nn.Conv2d(1, 1, 1)
        >>> initialize_convolutions(layer)
        >>> layer.bias.tolist()
        [0.0]
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
