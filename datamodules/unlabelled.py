"""Test images without a class: folders of other data sets, and the artefacts of JPEG on any set."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_bd.datamodules.images import ImageSet
from lightning_bd.image_files import read_image

__all__ = ("JpegImages", "UnlabelledImages", "find_images")


class UnlabelledImages(ImageSet):
    """Files of no known class, read when a batch needs them; every label is -1.

    Args:
        root: Folder that ``paths`` are relative to.
        paths: One relative path per image.
        image_shape: ``(C, H, W)`` that images are resized (bilinear, antialiased) and converted to, C being 1 or 3.

    Raises:
        ValueError: If images are to have another number of channels.
    """

    def __init__(self, root: Path, paths: Sequence[str], image_shape: tuple[int, int, int]) -> None:
        if image_shape[0] not in (1, 3):
            raise ValueError(f"Expected `image_shape` to have 1 channel or 3, but got {image_shape}.")
        self.root = root
        self.paths = np.array(paths, dtype=np.str_)
        self.labels = torch.full((len(paths),), -1)
        self.class_names = ()
        self.image_shape = image_shape

    def read(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` ``(B,)`` as ``(B, C, H, W)`` uint8.

        Raises:
            ValueError: If a file is not a readable image; the message names it.
        """
        channels, *size = self.image_shape
        files = [self.root / str(path) for path in self.paths[positions.numpy()]]
        return torch.stack([read_image(file, (size[0], size[1]), grey=channels == 1) for file in files])

    def select(self, positions: Tensor) -> "UnlabelledImages":
        """Return the set of the files at ``positions``."""
        return UnlabelledImages(self.root, [str(path) for path in self.paths[positions.numpy()]], self.image_shape)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of relative paths, file sizes and times, and the image shape."""
        digest = hashlib.sha256(repr(self.image_shape).encode())
        for path in self.paths.tolist():
            file = (self.root / path).stat()
            # Raw images of one shape have one size.
            digest.update(f"{path}\0{file.st_size}\0{file.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class JpegImages(ImageSet):
    """A set whose images were written as JPEG and read again, in memory.

    Args:
        images: The set.
        quality: Of the JPEG, in [1, 95].

    Example:
        >>> from lightning_bd.datamodules.images import TensorImages
        >>> noise = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
        >>> images = TensorImages(noise, torch.tensor([0]), "a")
        >>> torch.equal(JpegImages(images, 50).read(torch.tensor([0])), noise)
        False
    """

    def __init__(self, images: ImageSet, quality: int) -> None:
        self.images = images
        self.quality = quality
        self.labels = images.labels
        self.class_names = images.class_names
        self.image_shape = images.image_shape

    def read(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` ``(B,)`` as ``(B, C, H, W)`` uint8."""
        return torch.stack([_as_jpeg(image, self.quality) for image in self.images.read(positions)])

    def select(self, positions: Tensor) -> "JpegImages":
        """Return the set of the images at ``positions``."""
        return JpegImages(self.images.select(positions), self.quality)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of the set and the quality."""
        return hashlib.sha256(f"{self.images.fingerprint()} jpeg {self.quality}".encode()).hexdigest()


def find_images(folder: Path) -> list[str]:
    """Return the relative paths of the images in a folder and the folders in it, sorted.

    Args:
        folder: Where to look; what is hidden (``.name``) is left out.

    Raises:
        MisconfigurationException: If the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise MisconfigurationException(f"There is no folder {folder.absolute()}. Pass a folder of images.")
    found = (
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
    )
    paths = sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    if not paths:
        raise MisconfigurationException(
            f"The folder {folder.absolute()} holds no image ({', '.join(IMG_EXTENSIONS)}). Pass a folder of images."
        )
    return paths


def _as_jpeg(image: Tensor, quality: int) -> Tensor:
    grey = len(image) == 1
    pixels = image[0] if grey else image.permute(1, 2, 0)
    with io.BytesIO() as file:
        Image.fromarray(pixels.contiguous().numpy()).save(file, "JPEG", quality=quality)
        with Image.open(file) as written:
            read = torch.from_numpy(np.array(written))
    return read[None] if grey else read.permute(2, 0, 1)
