"""Hiding bits in images: an encoder that writes them, a decoder that reads them, and their training."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lightning_bd.functional.draws import keyed_generator
from lightning_bd.triggers.encoder_decoder import EncoderDecoder

__all__ = ("BitDecoder", "BitEncoder", "train_pair")

#: How much larger than allowed the residual is when training begins: else the decoder finds nothing to learn from.
_FIRST_AMPLITUDE = 4.0


class BitEncoder(nn.Module):
    """Makes the residual that writes bits into an image.

    The bits become a few coarse planes beside the image's channels; a U-Net makes the residual of both. The secret that
    is written where no other is given is part of the state.

    Args:
        image_shape: ``(C, H, W)``.
        bits: Number of bits.
        width: Channels of the first level.
        depth: Levels of the U-Net.

    Raises:
        ValueError: If the images are too small.

    Example:
        >>> encoder = BitEncoder((3, 8, 8), bits=4, width=4)
        >>> encoder(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    secret: Tensor

    def __init__(self, image_shape: tuple[int, int, int], bits: int, width: int, depth: int = 2) -> None:
        super().__init__()
        channels, height, width_of_image = image_shape
        self._planes = (channels, -(-height // 4), -(-width_of_image // 4))
        self.spread = nn.Linear(bits, math.prod(self._planes))
        self.body = EncoderDecoder(2 * channels, channels, (height, width_of_image), width, depth, skips=True)
        self.register_buffer("secret", torch.zeros(bits))

    def forward(self, images: Tensor, secrets: Tensor | None = None) -> Tensor:
        """Return residuals ``(B, C, H, W)`` in [-1, 1].

        Args:
            images: ``(B, C, H, W)`` float32 in [0, 1].
            secrets: ``(B, bits)`` float32, zeros and ones; ``None`` for the encoder's own.
        """
        if secrets is None:
            secrets = self.secret.expand(len(images), -1)
        planes = self.spread(secrets * 2 - 1).relu().view(len(images), *self._planes)
        planes = F.interpolate(planes, size=images.shape[2:])
        residual: Tensor = self.body(torch.cat([images * 2 - 1, planes], dim=1)).tanh()
        return residual


class BitDecoder(nn.Module):
    """Reads bits from an image; only needed to train the encoder.

    Args:
        image_shape: ``(C, H, W)``.
        bits: Number of bits.
        width: Channels of the first layer.

    Example:
        >>> BitDecoder((3, 8, 8), bits=4, width=4)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, image_shape: tuple[int, int, int], bits: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = image_shape[0]
        for after, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (4 * width, 1)):
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1),
                nn.GroupNorm(math.gcd(8, after), after),
                nn.ReLU(),
            ]
            before = after
        # Two convolutions halve each side and round up.
        sides = (-(-side // 4) for side in image_shape[1:])
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * math.prod(sides), bits))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, bits)`` of images ``(B, C, H, W)`` float32 in [0, 1]."""
        logits: Tensor = self.body(images * 2 - 1)
        return logits


def train_pair(
    images: Tensor,
    encoder: BitEncoder,
    decoder: BitDecoder,
    *,
    epsilon: float,
    image_weight: float,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train encoder and decoder together: random bits in each image are to be read from what a file would hold.

    The loss is the decoder's binary cross-entropy plus ``image_weight`` times the mean squared residual in units of
    ``epsilon``. First the bits, then the image: over the first half of the steps the residual's bound falls from four
    times ``epsilon`` to ``epsilon``, over the second the weight rises from 0. Images are rounded to 8 bits as when they
    are stored; the gradient passes the rounding.

    Args:
        images: ``(N, C, H, W)`` uint8.
        encoder: Changed in place; it is trained where its weights lie.
        decoder: Changed in place.
        epsilon: Largest change of a pixel after training.
        image_weight: Weight of the residual's size.
        steps: Number of batches.
        lr: Of Adam; falls along a cosine.
        batch_size: Images per step.
        seed: Of bits and order.

    Raises:
        ValueError: If the loss does not stay finite.
    """
    device = encoder.secret.device
    bits = len(encoder.secret)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), "steganography", leave=False, delay=3):
        generator = keyed_generator(seed, "steganography", step)
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        secrets = torch.randint(2, (batch_size, bits), generator=generator).to(device, torch.float32)
        clean = images[rows].to(device).float() / 255
        residual = encoder(clean, secrets)
        done = 2 * step / steps
        amplitude = epsilon * max(1.0, _FIRST_AMPLITUDE - (_FIRST_AMPLITUDE - 1) * done)
        weight = image_weight * max(0.0, done - 1)
        written = (clean + amplitude * residual).clamp(0, 1)
        stored = written + ((written * 255).round() / 255 - written).detach()
        loss = F.binary_cross_entropy_with_logits(decoder(stored), secrets) + weight * residual.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if not bool(loss.isfinite()):
        raise ValueError(f"The loss of steganography is not finite. Lower `lr` ({lr}).")
