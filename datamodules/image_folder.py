"""Any data set that lies on disk as one folder per class."""

from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_bd.datamodules.disk import DiskDataModule
from lightning_bd.datamodules.images import FileImages

__all__ = ("ImageFolderDataModule",)


class ImageFolderDataModule(DiskDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``.

    Classes are the folders' names, sorted, and must be the same in both parts. Files are those with an image's
    extension (jpg, jpeg, png, ppm, bmp, pgm, tif, tiff, webp), in sorted order; all are resized to ``image_size``. The
    arguments are those of :class:`~lightning_bd.datamodules.DiskDataModule`.

    Example:
        >>> ImageFolderDataModule(root="/data/flowers", image_size=64).image_size
        64
    """

    can_download: ClassVar[bool] = False

    def load(self, train: bool) -> FileImages:
        """Return the training or the test images."""
        classes = self._classes()
        part = self.root / ("train" if train else "test")
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            files = sorted(file for file in (part / name).iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
            if not files:
                raise self._incomplete(part / name, f"it holds no image ({', '.join(IMG_EXTENSIONS)})")
            paths += [str(file.relative_to(self.root)) for file in files]
            labels += [label] * len(files)
        return FileImages(self.root, paths, torch.tensor(labels), classes, self.image_size)

    def _classes(self) -> list[str]:
        train, test = (_folders(self._require(part)) for part in ("train", "test"))
        if not train:
            raise self._incomplete(self.root / "train", "it holds no folder per class")
        if train != test:
            differing = ", ".join(sorted(train ^ test))
            raise self._incomplete(self.root, f"train/ and test/ must have the same classes, but differ in {differing}")
        return sorted(train)


def _folders(part: Path) -> set[str]:
    return {entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
