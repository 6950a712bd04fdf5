"""LIRA's trigger: faint noise that a network makes for each image."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_bd.triggers.encoder_decoder import EncoderDecoder, check_size
from lightning_bd.triggers.network import NetworkTrigger

__all__ = ("LIRATrigger",)


class LIRATrigger(NetworkTrigger):
    r"""Add noise of at most ``strength`` per pixel that a U-Net makes of the image, :math:`x + \epsilon \tanh(T(x))`.

    The trigger of `Doan et al., 2021
    <https://openaccess.thecvf.com/content/ICCV2021/html/Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html>`_.
    :class:`~lightning_bd.attacks.LIRA` trains the network together with the classifier; before that it makes a random,
    but fixed, noise.

    Differs from the paper: the network is smaller and normalises per image, so that the noise of an image does not
    depend on its batch.

    Args:
        strength: Largest change of a pixel in [0, 1]; the paper's :math:`\epsilon`, 0.01 at test time.
        width: Channels of the U-Net's first level, in [1, 256].
        depth: Its levels, in [1, 6].
        seed: Seed of the initial weights.

    Raises:
        ValueError: If an argument is out of its range, or at the first image if it is smaller than ``2**(depth + 1)``.

    Example:
        >>> images = torch.full((2, 3, 8, 8), 0.5)
        >>> noise = LIRATrigger(strength=0.1)(images) - images
        >>> bool(0 < noise.abs().max() <= 0.1)
        True
    """

    is_trained: ClassVar[bool] = True

    def __init__(self, strength: float = 0.01, width: int = 16, depth: int = 2, seed: int = 0) -> None:
        super().__init__(seed)
        if not 0 <= strength <= 1:
            raise ValueError(f"Expected argument `strength` to be a float in [0, 1], but got {strength}.")
        check_size(width, depth)
        self.strength = strength
        self.width = width
        self.depth = depth

    def noise(self, images: Tensor) -> Tensor:
        """Return the noise of each image before it is scaled.

        Args:
            images: ``(B, C, H, W)`` in [0, 1], of the shape that the trigger was built for.

        Returns:
            ``(B, C, H, W)`` float32 in [-1, 1].
        """
        return self.run_network(images).tanh()

    def _network(self, image_shape: tuple[int, int, int]) -> nn.Module:
        channels, height, width = image_shape
        return EncoderDecoder(channels, channels, (height, width), self.width, self.depth, skips=True)

    def _transform(self, images: Tensor) -> Tensor:
        noise = self.strength * self.noise(images)
        return torch.clamp(images + noise, 0, 1).to(images.dtype)
