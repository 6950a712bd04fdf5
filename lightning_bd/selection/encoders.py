"""From images to features: what scores by similarity see through."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_bd.description import Description, describe

__all__ = ("Encoder", "RawPixels")


class Encoder(ABC):
    """Maps images to features; a subclass says how one batch is mapped.

    A subclass keeps the ``__init__`` arguments that change the features as attributes of the same name.

    Example:
        >>> class Brightness(Encoder):
        ...     def __call__(self, images):
        ...         return images.mean(dim=(2, 3))
        >>> Brightness().features(torch.full((5, 3, 2, 2), 255, dtype=torch.uint8)).shape
        torch.Size([5, 3])
    """

    #: Images that :meth:`features` maps at a time.
    batch_size = 256

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Return features ``(B, D)`` of images ``(B, C, H, W)`` float32 in [0, 1]; the same for the same image."""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Map any number of images, with a progress bar if it takes more than some seconds.

        Args:
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1].

        Returns:
            ``(N, D)`` float32 on the CPU.

        Raises:
            ValueError: If a batch does not become one row per image.
        """
        parts = []
        for batch in tqdm(torch.split(images, self.batch_size), "features", leave=False, delay=3):
            found = self(batch.float() / 255 if batch.dtype == torch.uint8 else batch.float())
            if found.ndim != 2 or len(found) != len(batch):
                raise ValueError(
                    f"Expected `{type(self).__name__}` to give features ({len(batch)}, D), but got "
                    f"{tuple(found.shape)}."
                )
            parts.append(found.float().cpu())
        return torch.cat(parts)

    def identity(self) -> Description:
        """Describe what the features depend on besides the images."""
        return describe(self)


class RawPixels(Encoder):
    """The pixels themselves: no knowledge at all, the trivial baseline.

    Example:
        >>> RawPixels()(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 48])
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(B, C * H * W)``."""
        return images.flatten(1)
