"""Sets of labelled images: in memory as uint8, or read from files when a batch needs them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.image_files import read_image, read_images

__all__ = ("FileImages", "ImageSet", "TensorImages", "hold", "resize")

#: Sets that decode to less than this many bytes are held in memory.
MEMORY_LIMIT = 2 * 1024**3


class ImageSet(ABC):
    """Labelled images of one size.

    Attributes:
        labels: ``(N,)`` int64 in ``[0, len(class_names))``.
        class_names: Name of each class.
        image_shape: ``(C, H, W)`` of every image.
    """

    labels: Tensor
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` ``(B,)`` as ``(B, C, H, W)`` uint8."""

    @abstractmethod
    def select(self, positions: Tensor) -> "ImageSet":
        """Return the set of the images at ``positions``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of the content: images (or files' names and sizes) and labels."""


class TensorImages(ImageSet):
    """Images held in memory.

    Args:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` integers in ``[0, len(class_names))``.
        class_names: Name of each class.

    Raises:
        ValueError: If shapes, dtype or labels do not fit.

    Example:
        >>> images = TensorImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
        >>> images.read(torch.tensor([1])).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(
                f"Expected argument `images` to be (N, C, H, W) uint8, but got {tuple(images.shape)} {images.dtype}."
            )
        self.images = images.contiguous()
        self.labels = _checked_labels(labels, len(images), class_names)
        self.class_names = tuple(class_names)
        self.image_shape = (images.shape[1], images.shape[2], images.shape[3])

    def read(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` ``(B,)`` as ``(B, C, H, W)`` uint8."""
        # Several times faster than `images[positions]`.
        return self.images.index_select(0, positions)

    def select(self, positions: Tensor) -> "TensorImages":
        """Return the set of the images at ``positions``, copied."""
        return TensorImages(self.read(positions), self.labels[positions], self.class_names)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of shape, pixels and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


class FileImages(ImageSet):
    """Images that stay on disk and are decoded, resized and converted when they are read.

    Args:
        root: Folder that ``paths`` are relative to; the fingerprint does not depend on it.
        paths: One relative path per image.
        labels: ``(N,)`` integers in ``[0, len(class_names))``.
        class_names: Name of each class.
        image_size: Height and width that images are resized to (bilinear, antialiased) if they differ.
        grey: Read one channel instead of three.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Tensor,
        class_names: Sequence[str],
        image_size: int,
        grey: bool = False,
    ) -> None:
        self.root = root
        self.paths = np.array(paths, dtype=np.str_)  # one block of memory that forked workers share
        self.labels = _checked_labels(labels, len(paths), class_names)
        self.class_names = tuple(class_names)
        self.image_shape = (1 if grey else 3, image_size, image_size)

    def read(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` ``(B,)`` as ``(B, C, H, W)`` uint8, C being 3, or 1 if they are grey.

        Raises:
            ValueError: If a file is not a readable image; the message names it.
        """
        return torch.stack([self._read_one(position) for position in positions.tolist()])

    def select(self, positions: Tensor) -> "FileImages":
        """Return the set of the files at ``positions``."""
        paths = [str(path) for path in self.paths[positions.numpy()]]
        labels, (channels, size, _) = self.labels[positions], self.image_shape
        return FileImages(self.root, paths, labels, self.class_names, size, grey=channels == 1)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of relative paths, file sizes, labels and the image size."""
        digest = hashlib.sha256(repr(self.image_shape).encode())
        for path, label in zip(self.paths.tolist(), self.labels.tolist(), strict=True):
            digest.update(f"{path}\0{(self.root / path).stat().st_size}\0{label}\n".encode())
        return digest.hexdigest()

    def in_memory(self, threads: int = 4) -> TensorImages:
        """Decode every file now.

        Args:
            threads: Threads that decode; Pillow releases the interpreter lock while it does.
        """
        files = [self.root / path for path in self.paths.tolist()]
        return TensorImages(read_images(files, self.image_shape, threads=threads), self.labels, self.class_names)

    def _read_one(self, position: int) -> Tensor:
        channels, size, _ = self.image_shape
        return read_image(self.root / str(self.paths[position]), size, grey=channels == 1)


def hold(images: ImageSet, in_memory: bool | None) -> ImageSet:
    """Decode a set of files now, or leave it on disk.

    Args:
        images: The set; one that is in memory stays as it is.
        in_memory: Whether to decode; ``None``: if that needs less than two gigabytes.
    """
    if not isinstance(images, FileImages):
        return images
    channels, height, width = images.image_shape
    fits = len(images) * channels * height * width <= MEMORY_LIMIT
    return images.in_memory() if (fits if in_memory is None else in_memory) else images


def resize(images: Tensor, size: int) -> Tensor:
    """Resize a whole set of stored images (bilinear, antialiased).

    Args:
        images: ``(N, C, H, W)`` uint8.
        size: Height and width of the result.

    Returns:
        ``(N, C, size, size)`` uint8; ``images`` itself if they have that size.

    Example:
        >>> resize(torch.full((2, 3, 32, 32), 7, dtype=torch.uint8), 8).unique()
        tensor([7], dtype=torch.uint8)
    """
    if images.shape[2:] == (size, size):
        return images
    resized = images.new_empty((*images.shape[:2], size, size))
    # In parts: the interpolation needs room for intermediate results.
    for part, target in zip(torch.split(images, 1024), torch.split(resized, 1024), strict=True):
        target.copy_(F.interpolate(part, size=(size, size), mode="bilinear", antialias=True))
    return resized


def _checked_labels(labels: Tensor, count: int, class_names: Sequence[str]) -> Tensor:
    labels = labels.to(torch.int64)
    if labels.shape != (count,):
        raise ValueError(f"Expected one label per image ({count}), but got shape {tuple(labels.shape)}.")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(
            f"Expected labels in [0, {len(class_names)}), but got {int(labels.min())} to {int(labels.max())}."
        )
    return labels
