"""Knowing images again by their pixels, so that their order in a data set does not matter."""

import hashlib

import torch
from torch import Tensor

__all__ = ("image_digests", "keyed_order", "to_bytes")


def to_bytes(images: Tensor) -> Tensor:
    """Return images as uint8.

    Args:
        images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1]; the latter are rounded to 8 bits.

    Raises:
        ValueError: If it is no such tensor.
    """
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "Expected argument `images` to be (N, C, H, W), uint8 or floating-point in [0, 1], "
            f"but got {tuple(images.shape)} {images.dtype}."
        )
    return images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)


def image_digests(images: Tensor) -> list[bytes]:
    """Return 16 bytes per image that equal images share and others do not.

    Args:
        images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1].

    Example:
        >>> first, second, third = image_digests(torch.tensor([0, 0, 1], dtype=torch.uint8).view(3, 1, 1, 1))
        >>> first == second, first == third
        (True, False)
    """
    pixels = to_bytes(images).cpu().contiguous()
    return [hashlib.blake2b(image.numpy().data, digest_size=16).digest() for image in pixels]


def keyed_order(digest: bytes, key: str) -> bytes:
    """Return what to sort an image by to put it in an order that is random, but always the same for one key.

    Args:
        digest: The image's, of :func:`image_digests`.
        key: Seed and purpose of the order.
    """
    return hashlib.blake2b(digest, digest_size=16, key=hashlib.sha256(key.encode()).digest()).digest()
