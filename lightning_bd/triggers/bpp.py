"""BppAttack: fewer bits per pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("BppAttack",)


class BppAttack(Trigger):
    """Round every channel to the ``2**bits`` levels of a coarser palette.

    The trigger of `Wang et al., 2022 <https://arxiv.org/abs/2205.13383>`_: nothing is added to the image, it only loses
    colour depth, ``round(x * (2**bits - 1)) / (2**bits - 1)``. With ``dithering`` the error of each pixel is passed on
    to its neighbours (Floyd and Steinberg), which hides the bands that rounding leaves.
    The paper's negative samples are its cover samples: an image plus the residual, triggered minus clean, that does
    not belong to it. The authors use ``cover_rate`` 0.2 with ``rate`` 0.2.

    Differs from the paper: a cover takes its own residual, shifted around the image by a random number of rows and
    columns, where the paper takes another image's, so that a cover does not depend on the rest of its batch. The
    paper's contrastive adversarial training belongs to the model and is not part of a trigger.

    Args:
        bits: Bits per channel that remain, 1 to 7; 3, the 8 levels that the released code uses by default.
        dithering: Diffuse the errors; off by default in the released code.

    Raises:
        ValueError: If ``bits`` is out of its range.

    Example:
        >>> BppAttack(bits=1)(torch.tensor([[[[0.2, 0.4, 0.6, 0.9]]]]))
        tensor([[[[0., 0., 1., 1.]]]])
        >>> BppAttack(bits=1, dithering=True)(torch.full((1, 1, 2, 4), 0.5))[0, 0]
        tensor([[0., 1., 0., 1.],
                [1., 0., 1., 0.]])
    """

    def __init__(self, bits: int = 3, dithering: bool = False) -> None:
        super().__init__()
        if not isinstance(bits, int) or not 1 <= bits <= 7:
            raise ValueError(f"Expected argument `bits` to be an integer in [1, 7], but got {bits}.")
        self.bits = bits
        self.dithering = dithering

    def cover(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add the trigger's residual at another place, drawn per image: the paper's negative mode.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.
            generator: CPU generator of the places; ``None`` is torch's global one.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        batch, channels, height, width = images.shape
        shifts = torch.randint(1, max(2, height * width), (batch, 1), generator=generator, device="cpu")
        rows = (torch.arange(height, device="cpu") + shifts // width) % height
        columns = (torch.arange(width, device="cpu") + shifts % width) % width
        places = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).view(batch, 1, height * width).to(images.device)
        residual = (self._transform(images) - images).flatten(2)
        return residual.gather(2, places.expand(-1, channels, -1)).view(images.shape).add_(images).clamp_(0, 1)

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        return {}

    def _transform(self, images: Tensor) -> Tensor:
        top = 2**self.bits - 1
        # In float32 whatever the images are: a level must not depend on the precision.
        levels = torch.mul(images.float(), top)
        levels = _diffused(levels, top) if self.dithering else levels.round_()
        return levels.div_(top).to(images.dtype)


def _diffused(values: Tensor, top: int) -> Tensor:
    """Round ``(B, C, H, W)`` to whole levels in [0, ``top``], passing errors on to the right and downwards.

    A pixel waits for its left neighbour and for the three above it. All pixels of equal ``column + 2 * row`` wait for
    no other of them, so the loop has ``W + 2 * H - 2`` steps in place of ``H * W``.
    """
    batch, channels, height, width = values.shape
    # Pixels first: one step's pixels are then evenly spaced rows. The rim stands for neighbours that are not there.
    stride = width + 2
    # A transposed matrix is copied several times faster than permuted dimensions.
    count = batch * channels
    pixels = values.detach().reshape(count, height * width).t().contiguous().view(height, width, count)
    pixels = F.pad(pixels, (0, 0, 1, 1, 1, 0)).flatten(0, 1)
    errors = torch.zeros_like(pixels)
    for step in range(width + 2 * height - 2):
        first_row, last_row = max(0, (step - width + 2) // 2), min(height - 1, step // 2)
        if first_row > last_row:
            continue
        start = (first_row + 1) * stride + step - 2 * first_row + 1
        stop = start + (last_row - first_row) * width + 1
        left, above_left, above, above_right = (
            errors[start - back : stop - back : width] for back in (1, stride + 1, stride, stride - 1)
        )
        here = pixels[start:stop:width]
        here.add_(left, alpha=7 / 16).add_(above_left, alpha=1 / 16)
        here.add_(above, alpha=5 / 16).add_(above_right, alpha=3 / 16)
        torch.sub(here, here.round(), out=errors[start:stop:width])
    # No error exceeds half a step, and neither does what a pixel gets: only a tie at the top could leave the palette.
    levels = pixels.sub_(errors).round_().clamp_(0, top).view(height + 1, stride, count)[1:, 1:-1]
    return levels.reshape(height * width, count).t().reshape(values.shape)
