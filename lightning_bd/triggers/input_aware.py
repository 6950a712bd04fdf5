"""The input-aware trigger: each image has a mask and a pattern of its own."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_bd.triggers.encoder_decoder import EncoderDecoder, check_size
from lightning_bd.triggers.network import NetworkTrigger

__all__ = ("InputAwareTrigger",)


class InputAwareTrigger(NetworkTrigger):
    r"""Replace the masked pixels of an image by a pattern, both made for this image by networks.

    The trigger of `Nguyen and Tran, 2020 <https://arxiv.org/abs/2010.08138>`_: :math:`x + (p(x) - x) \, m(x)` with a
    pattern :math:`p` in [0, 1] and a mask :math:`m` of one channel that is nearly 0 or 1. Another image's trigger is
    not to work: its cover samples, the paper's cross-trigger mode, carry one.
    :class:`~lightning_bd.attacks.InputAware` trains the networks; before that the trigger is random, but fixed.

    Differs from the paper: the networks are those of its smallest data set and normalise per image, so that an image's
    trigger does not depend on its batch. For the same reason the trigger of a cover is made from the image itself,
    mirrored and shifted around by a random number of rows and columns; while a model trains the trigger it uses another
    image, as in the paper.

    Args:
        width: Channels of each network's first level, in [1, 256].
        depth: Levels of each network, in [1, 6].
        seed: Seed of the initial weights.

    Raises:
        ValueError: If an argument is out of its range, or at the first image if it is smaller than ``2**(depth + 1)``.

    Example:
        >>> trigger = InputAwareTrigger(width=4)
        >>> images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(trigger(images), trigger.put(images, images))
        True
    """

    is_trained: ClassVar[bool] = True

    def __init__(self, width: int = 16, depth: int = 2, seed: int = 0) -> None:
        super().__init__(seed)
        check_size(width, depth)
        self.width = width
        self.depth = depth

    def mask(self, images: Tensor) -> Tensor:
        """Return where each image's trigger is: ``(B, 1, H, W)`` float32 in [0, 1], nearly binary.

        Args:
            images: ``(B, C, H, W)`` in [0, 1], of the shape that the trigger was built for.
        """
        # The paper's tanh(20 u - 10) / 2 + 0.5 of u = tanh(z) / 2 + 0.5.
        return torch.sigmoid(20 * self.run_network(images, self.part("mask")).tanh())

    def pattern(self, images: Tensor) -> Tensor:
        """Return what each image's trigger looks like: ``(B, C, H, W)`` float32 in [0, 1].

        Args:
            images: ``(B, C, H, W)`` in [0, 1], of the shape that the trigger was built for.
        """
        return self.run_network(images, self.part("pattern")).tanh() / 2 + 0.5

    def part(self, name: Literal["mask", "pattern"]) -> nn.Module:
        """Return one of the two networks.

        Args:
            name: Which.
        """
        assert isinstance(self.network, nn.ModuleDict)
        return self.network[name]

    def has_initial_mask(self) -> bool:
        """Return whether the mask's network is still the one that the seed gives."""
        assert self.image_shape is not None, "the trigger must be built first"
        initial = self._compute(self.image_shape)
        now = self.state_dict()
        return all(torch.equal(now[n].cpu(), tensor) for n, tensor in initial.items() if n.startswith("network.mask."))

    def put(self, images: Tensor, others: Tensor, patterns: Tensor | None = None) -> Tensor:
        """Put the triggers that are made for some images on others.

        Args:
            images: ``(B, C, H, W)`` in [0, 1], to be changed; not modified.
            others: ``(B, C, H, W)`` in [0, 1], whose triggers are put on.
            patterns: ``(B, C, H, W)`` in [0, 1], the patterns of ``others``, where they are known.

        Returns:
            A new tensor of the shape and dtype of ``images``.
        """
        if patterns is None:
            patterns = self.pattern(others)
        return torch.clamp(images + (patterns - images) * self.mask(others), 0, 1).to(images.dtype)

    def cover(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Put on the trigger of another image: of the image itself, mirrored and shifted.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.
            generator: CPU generator of the shifts; ``None`` is torch's global one.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        height, width = images.shape[2:]
        rows, columns = (
            torch.randint(side, (len(images),), generator=generator, device="cpu").tolist() for side in (height, width)
        )
        mirrored = images.flip(3)
        shifted = [
            image.roll((down, right), (1, 2)) for image, down, right in zip(mirrored, rows, columns, strict=True)
        ]
        return self.put(images, torch.stack(shifted)) if shifted else images.clone()

    def _network(self, image_shape: tuple[int, int, int]) -> nn.Module:
        channels, *size = image_shape
        parts = {
            name: EncoderDecoder(channels, outputs, (size[0], size[1]), self.width, self.depth)
            for name, outputs in (("mask", 1), ("pattern", channels))
        }
        return nn.ModuleDict(parts)

    def _transform(self, images: Tensor) -> Tensor:
        return self.put(images, images)
