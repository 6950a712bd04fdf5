"""A small network from images to images, of which triggers are made."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ("EncoderDecoder", "check_size")

#: A file that is not trusted may ask for a network.
_MAX_WIDTH, _MAX_DEPTH = 256, 6


def check_size(width: int, depth: int) -> None:
    """Raise ``ValueError`` if an :class:`EncoderDecoder` of this size is not made here.

    Args:
        width: Channels of the first level.
        depth: Levels.
    """
    for name, value, most in (("width", width, _MAX_WIDTH), ("depth", depth, _MAX_DEPTH)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"Expected argument `{name}` to be an integer in [1, {most}], but got {value!r}.")


class EncoderDecoder(nn.Module):
    """Convolutions down to a small image and up again, without an activation at the end.

    Each level has two 3x3 convolutions, each with a normalisation over groups of channels and ReLU; the side is halved
    from level to level and the number of channels doubled. What it makes of an image does not depend on the rest of
    the batch.

    Args:
        in_channels: Channels of the images.
        out_channels: Channels of what comes out.
        image_size: Height and width of the images.
        width: Channels of the first level, in [1, 256].
        depth: Levels, in [1, 6]; the sides are at least ``2**(depth + 1)`` pixels.
        skips: Whether each level up also sees what the level down saw (`U-Net <https://arxiv.org/abs/1505.04597>`_).

    Raises:
        ValueError: If an argument is out of its range, or the images are too small.

    Example:
        >>> EncoderDecoder(3, 1, (9, 8), width=4)(torch.zeros(2, 3, 9, 8)).shape
        torch.Size([2, 1, 9, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: tuple[int, int],
        width: int = 16,
        depth: int = 2,
        skips: bool = False,
    ) -> None:
        super().__init__()
        check_size(width, depth)
        # A single pixel at the bottom would be normalised away.
        if min(image_size) < 2 ** (depth + 1):
            raise ValueError(
                f"Expected images of at least {2 ** (depth + 1)} pixels along each side for `depth` {depth}, but got "
                f"{image_size[0]}x{image_size[1]}. Lower `depth`."
            )
        self.skips = skips
        widths = [width * 2**level for level in range(depth)]
        inputs = [in_channels, *widths[:-1]]
        self.down = nn.ModuleList([_block(before, after) for before, after in zip(inputs, widths, strict=True)])
        self.middle = _block(widths[-1], widths[-1])
        outputs = [widths[0], *widths[:-1]]
        self.up = nn.ModuleList(
            [_block(wide * (1 + skips), narrow) for wide, narrow in zip(widths, outputs, strict=True)]
        )
        self.head = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``."""
        levels = []
        features = images
        for block in self.down:
            features = block(features)
            levels.append(features)
            features = F.max_pool2d(features, 2)
        features = self.middle(features)
        for block, level in zip(reversed(self.up), reversed(levels), strict=True):
            # Nearest: the gradient of a bilinear one is not deterministic on CUDA.
            features = F.interpolate(features, size=level.shape[2:])
            features = block(torch.cat([features, level], dim=1) if self.skips else features)
        output: Tensor = self.head(features)
        return output


def _block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        convolution = nn.Conv2d(channels, after, 3, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(math.gcd(8, after), after), nn.ReLU()]
    return nn.Sequential(*layers)
