"""SSBA: bits that a network hides in the image, in each image differently."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_bd.functional.draws import keyed_generator
from lightning_bd.triggers.base import TensorSpec
from lightning_bd.triggers.encoder_decoder import check_size
from lightning_bd.triggers.learned import LearnedTrigger
from lightning_bd.triggers.network import NetworkTrigger
from lightning_bd.triggers.steganography import BitDecoder, BitEncoder, train_pair

__all__ = ("SSBA",)

#: A file that is not trusted may ask for a network.
_MAX_BITS = 1024


class SSBA(LearnedTrigger, NetworkTrigger):
    """Hide a secret bit string in the image by a steganographic encoder; the residual depends on the image.

    The trigger of `Li et al., 2021 <https://arxiv.org/abs/2012.03816>`_. Encoder and decoder are trained on the
    attacker's images: the decoder reads from the encoded image the random bits that the encoder was given, a new string
    for each image. The trigger is the encoder with one string, drawn from ``seed``; only the encoder is kept.

    Differs from the paper: what keeps the residual small is a hard bound and its mean square, without the perceptual
    (LPIPS) and the adversarial loss of the paper; the encoder is a small U-Net for small images, and the decoder has no
    spatial transformer. Nothing makes the residual differ between images but that the network sees the image.

    Args:
        epsilon: Largest change of a pixel, in (0, 1]; ours.
        bits: Length of the string, 1 to 1024. Small images have little room; the fewer, the fainter.
        width: Channels of the encoder's first level, 1 to 256; 16 are under 60,000 weights for colour images.
        image_weight: Weight of the residual's mean square beside the bits' cross-entropy, not negative. With 0 the
            residual fills its bound; with too much the decoder still reads it, but no victim learns it.
        steps: Number of batches to train on; the more, the fainter the residual becomes at the same weight.
        lr: Of Adam; falls along a cosine.
        batch_size: Images per step.
        seed: Of the string, and of the training.
        device: Where to train.

    Raises:
        ValueError: If an argument is out of its range; when learnt, if a side of the images is below 8 pixels or the
            loss does not stay finite.

    Example:
        >>> trigger = SSBA(bits=2, width=1)
        >>> trigger.hyperparameters
        {'epsilon': 0.06274509803921569, 'bits': 2, 'width': 1, 'seed': 0}
    """

    needs_other_classes: ClassVar[bool] = True
    only_for_learning: ClassVar[tuple[str, ...]] = ("image_weight", "steps", "lr", "batch_size", "device")

    def __init__(
        self,
        epsilon: float = 16 / 255,
        bits: int = 16,
        width: int = 16,
        image_weight: float = 1e-3,
        steps: int = 1000,
        lr: float = 1e-3,
        batch_size: int = 32,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__(seed)
        if not 0 < epsilon <= 1:
            raise ValueError(f"Expected argument `epsilon` to be a float in (0, 1], but got {epsilon}.")
        if not isinstance(bits, int) or not 1 <= bits <= _MAX_BITS:
            raise ValueError(f"Expected argument `bits` to be an integer in [1, {_MAX_BITS}], but got {bits}.")
        check_size(width, depth=2)
        if not 0 <= image_weight < float("inf"):
            raise ValueError(f"Expected argument `image_weight` to be a non-negative float, but got {image_weight}.")
        if not 0 < lr < float("inf"):
            raise ValueError(f"Expected argument `lr` to be a positive float, but got {lr}.")
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        self.epsilon = epsilon
        self.bits = bits
        self.width = width
        self.image_weight = image_weight
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size
        # Not under the argument's name: where it is trained does not make it another trigger.
        self._device = torch.device(device)

    def _network(self, image_shape: tuple[int, int, int]) -> nn.Module:
        if min(image_shape[1:]) < 8:
            raise ValueError(
                f"Expected images of at least 8 pixels along each side for `SSBA`, but got shape {image_shape}. Use "
                "larger images or another trigger."
            )
        return BitEncoder(image_shape, self.bits, self.width)

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {**super()._specs(image_shape), "network.secret": TensorSpec((self.bits,), 0.0, 1.0)}

    def _learn(self, images: Tensor, labels: Tensor, target: int | None) -> dict[str, Tensor]:
        _, channels, height, width = images.shape
        encoder = BitEncoder((channels, height, width), self.bits, self.width)
        decoder = BitDecoder((channels, height, width), self.bits, self.width)
        encoder.secret.copy_(torch.randint(2, (self.bits,), generator=keyed_generator(self.seed, "secret")))
        train_pair(
            images,
            encoder.to(self._device),
            decoder.to(self._device),
            epsilon=self.epsilon,
            image_weight=self.image_weight,
            steps=self.steps,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        return {f"network.{name}": tensor for name, tensor in encoder.state_dict().items()}

    def _transform(self, images: Tensor) -> Tensor:
        # Weights of an untrusted file may overflow.
        residual = self.run_network(images).nan_to_num_(0.0)
        return torch.add(images, residual.to(images.dtype), alpha=self.epsilon).clamp_(0, 1)
