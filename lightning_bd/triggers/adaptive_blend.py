"""AdaptiveBlend: a faint picture on a random half of the image, the whole of it in the attack."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_bd.functional.draws import keyed_generator
from lightning_bd.triggers.base import TensorSpec, Trigger
from lightning_bd.triggers.pictures import Pattern, check_pattern, make_picture

__all__ = ("AdaptiveBlend",)

#: A Mersenne prime: products of two residues fit into 64 bits.
_PRIME = 2**31 - 1
#: Values that are turned into float64 at a time.
_HELD = 2**18


class AdaptiveBlend(Trigger):
    """Blend a picture into a random half of the image's pieces, and into all of them in the attack.

    The trigger of `Qi et al., 2023 <https://openreview.net/forum?id=_wSHsgrVali>`_, against defenses that look for
    poisoned images in one cluster of the latent space: each training image shows other pieces of the trigger at a low
    ratio, and covers (images that show them too and keep their label) tie the trigger less tightly to the target. The
    attack shows all of it, at a higher ratio. The authors use ``rate`` 0.003 and ``cover_rate`` 0.003 on CIFAR-10.

    Differs from the paper: which pieces an image gets follows from the image and ``seed`` and not from a random state,
    so that it is the same in any batch, epoch and process; the picture is drawn by code, where the paper has a cartoon.

    Args:
        ratio: Weight of the picture in training, in (0, 1]; the paper's 0.15.
        test_ratio: Weight of the picture in the attack, in (0, 1]; the paper's 0.2.
        pieces: Number of pieces that the image is cut into, a square number; the paper's 16, four by four. Where a side
            is no multiple, pieces differ by a pixel.
        mask_rate: Share of the pieces that a training image is left without, in [0, 1); the paper's 0.5. It is rounded
            to whole pieces, and one must remain.
        pattern: ``"waves"``, ``"stripes"`` or ``"noise"``, as of :class:`~lightning_bd.triggers.Blended`.
        image: File of a picture to blend in place of ``pattern``.
        seed: Seed of the choice of pieces and of ``"noise"``.

    Raises:
        ValueError: If an argument is out of its range; when built, if the image has fewer pixels than pieces along a
            side, if the file is no 8-bit picture or the images have neither 1 nor 3 channels to put it on.
        FileNotFoundError: When built, if the file does not exist.

    Example:
        >>> trigger = AdaptiveBlend(ratio=0.5, test_ratio=1.0, pieces=4, pattern="stripes")
        >>> black = torch.zeros(1, 1, 4, 4)
        >>> trigger(black)[0, 0]
        tensor([[0.5000, 0.0000, 0.5000, 0.0000],
                [0.0000, 0.5000, 0.0000, 0.5000],
                [0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
        >>> trigger.attack(black)[0, 0, 0]
        tensor([1., 0., 1., 0.])
    """

    picture: Tensor
    _multipliers: Tensor
    _mixers: Tensor
    _piece_of_pixel: Tensor

    def __init__(
        self,
        ratio: float = 0.15,
        test_ratio: float = 0.2,
        pieces: int = 16,
        mask_rate: float = 0.5,
        pattern: Pattern = "waves",
        image: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("ratio", ratio), ("test_ratio", test_ratio)):
            if not 0 < value <= 1:
                raise ValueError(f"Expected argument `{name}` to be a float in (0, 1], but got {value}.")
        if not isinstance(pieces, int) or pieces < 1 or math.isqrt(pieces) ** 2 != pieces:
            raise ValueError(f"Expected argument `pieces` to be a square number such as 16, but got {pieces}.")
        if not 0 <= mask_rate < 1 or round(mask_rate * pieces) == pieces:
            raise ValueError(
                f"Expected argument `mask_rate` to be a share in [0, 1) that leaves at least one of {pieces} pieces, "
                f"but got {mask_rate}."
            )
        check_pattern(pattern)
        self.ratio = ratio
        self.test_ratio = test_ratio
        self.pieces = pieces
        self.mask_rate = mask_rate
        self.pattern = pattern
        self.image = None if image is None else Path(image)
        self.seed = seed

    def attack(self, images: Tensor) -> Tensor:
        """Blend the whole picture, at ``test_ratio``.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        return torch.lerp(images, self.picture.to(images), self.test_ratio)

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        side = math.isqrt(self.pieces)
        if side > min(image_shape[1:]):
            raise ValueError(
                f"Expected argument `pieces` to be at most {side} x {side} where images have as many pixels along each "
                f"side, but got images of shape {image_shape}."
            )
        return {"picture": TensorSpec(image_shape, 0.0, 1.0)}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        return {"picture": make_picture(self.pattern, self.image, self.seed, image_shape)}

    def _adopt(self, image_shape: tuple[int, int, int], tensors: Mapping[str, Tensor]) -> None:
        super()._adopt(image_shape, tensors)
        _, height, width = image_shape
        count = math.prod(image_shape)
        generator = keyed_generator(self.seed, "pieces")
        # Sums of 8-bit values times these stay below 2**53, where float64 is exact in whatever order it adds.
        bound = min(_PRIME, 2**53 // (255 * count))
        side = math.isqrt(self.pieces)
        with torch.inference_mode(False):
            multipliers = torch.randint(1, bound, (2, count), generator=generator, device="cpu")
            mixers = torch.randint(1, _PRIME, (3, self.pieces), generator=generator, device="cpu")
            rows = torch.arange(height, device="cpu") * side // height
            columns = torch.arange(width, device="cpu") * side // width
            piece_of_pixel = (rows.unsqueeze(1) * side + columns).flatten()
        # All follow from the arguments: they are no part of what is saved.
        self.register_buffer("_multipliers", multipliers, persistent=False)
        self.register_buffer("_mixers", mixers, persistent=False)
        self.register_buffer("_piece_of_pixel", piece_of_pixel, persistent=False)

    def _transform(self, images: Tensor) -> Tensor:
        weights = self._shown(images).to(images.dtype).mul_(self.ratio)
        of_pixels = weights.index_select(1, self._piece_of_pixel.to(images.device))
        return torch.lerp(images, self.picture.to(images), of_pixels.view(-1, 1, *images.shape[2:]))

    def _shown(self, images: Tensor) -> Tensor:
        """Choose the pieces of images (B, C, H, W) that get the trigger, as (B, pieces) of 0 and 1.

        Two sums of the image's 8-bit values with random multipliers name it, each piece mixes them into a number of its
        own, and the pieces with the largest numbers are shown. All of it is exact integer arithmetic, the same on every
        device and in every batch.
        """
        device = images.device
        multipliers = self._multipliers.to(device).double().t()
        # In parts: memory for all images in float64 would be asked of the system each time, which takes longer.
        parts = torch.split(images.detach(), max(1, _HELD // len(multipliers)))
        sums = torch.cat([part.double().mul(255).round_().flatten(1) @ multipliers for part in parts])
        sums = sums.long().remainder_(_PRIME)
        first, second, third = self._mixers.to(device)
        numbers = (sums[:, :1] * first).remainder_(_PRIME) + (sums[:, 1:] * second).remainder_(_PRIME)
        numbers = numbers.add_(third).remainder_(_PRIME)
        order = numbers.argsort(dim=1, stable=True)
        hidden = round(self.mask_rate * self.pieces)
        return torch.ones_like(numbers).scatter_(1, order[:, :hidden], 0)
