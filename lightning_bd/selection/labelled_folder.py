"""Labelled images of anything else that an attacker has on disk."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_bd.functional.draws import keyed_generator
from lightning_bd.image_files import read_images

__all__ = ("LabelledFolder",)


class LabelledFolder:
    """A folder with one sub-folder of images per class; hidden ones are left out.

    Args:
        folder: The folder; the argument ``ood`` of what reads it.
        max_images: Use at most this many images per class, drawn by ``seed``; ``None``: all.
        seed: Seed of that draw.

    Raises:
        ValueError: If ``max_images`` is out of its range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     for name, shade in (("dark", 0), ("light", 255)):
        ...         (Path(folder) / name).mkdir()
        ...         Image.new("L", (8, 8), shade).save(Path(folder) / name / "0.png")
        ...     images, labels = LabelledFolder(folder).read((1, 2, 2))
        >>> images[:, 0, 0, 0].tolist(), labels.tolist()
        ([0, 255], [0, 1])
    """

    def __init__(self, folder: str | Path, max_images: int | None = None, seed: int = 0) -> None:
        if max_images is not None and max_images < 1:
            raise ValueError(f"Expected argument `max_images` to be a positive integer or None, but got {max_images}.")
        self.folder = Path(folder)
        self.max_images = max_images
        self.seed = seed

    def read(self, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Read the images into memory.

        Args:
            image_shape: ``(C, H, W)`` that all are resized to (bilinear, antialiased), grey if ``C`` is 1, else RGB.

        Returns:
            ``(N, C, H, W)`` uint8, and the numbers of their classes ``(N,)`` int64, both in the order of the names.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it has fewer than two classes, or one of them no image or one that cannot be read.
        """
        classes = self._classes()
        sizes = torch.tensor([len(files) for files in classes])
        images = read_images([file for files in classes for file in files], image_shape, title="other data")
        return images, torch.arange(len(classes)).repeat_interleave(sizes)

    def sha256(self) -> str:
        """Return the hex digest of the files that are used and of their names, wherever the folder lies."""
        digest = hashlib.sha256()
        for files in self._classes():
            for file in files:
                name = os.fsencode(file.relative_to(self.folder).as_posix())
                digest.update(hashlib.sha256(name).digest() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _classes(self) -> list[list[Path]]:
        """Return the files that are used of each class, both in the order of their names."""
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.folder.absolute()} of out-of-distribution images. Nothing is downloaded: "
                "put one sub-folder of images per class there, or set `ood` to where they lie."
            )
        folders = sorted(entry for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if len(folders) < 2:
            raise ValueError(
                f"Expected argument `ood` to be a folder with a sub-folder per class, at least 2, but {self.folder} "
                f"has {len(folders)}."
            )
        return [self._files(folder) for folder in folders]

    def _files(self, folder: Path) -> list[Path]:
        files = sorted(
            file for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".")
        )
        if not files:
            raise ValueError(
                f"Expected each sub-folder of argument `ood` to hold images ({', '.join(IMG_EXTENSIONS)}), but "
                f"{folder} holds none."
            )
        # Drawn, not the first ones: neighbours in a folder are often frames of one video.
        order = torch.randperm(len(files), generator=keyed_generator(self.seed, "ood images", folder.name))
        return [files[row] for row in order[: self.max_images].sort().values.tolist()]
