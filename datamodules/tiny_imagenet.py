"""Tiny ImageNet."""

from pathlib import Path
from typing import ClassVar

import torch

from lightning_bd.datamodules.disk import DiskDataModule
from lightning_bd.datamodules.images import FileImages

__all__ = ("TinyImageNetDataModule",)


class TinyImageNetDataModule(DiskDataModule):
    """100,000 training and 10,000 test photographs of 64x64 pixels, 200 classes (`CS231n <http://cs231n.stanford.edu>`_).

    The official folder, unpacked: ``root/tiny-imagenet-200`` with ``wnids.txt``, ``words.txt``, ``train/<wnid>/images``
    and ``val``. The official test part has no labels; the validation part is the test set here, as in the papers.
    Classes are numbered in the order of their sorted WordNet ids. There is no download: fetch and unpack
    ``tiny-imagenet-200.zip`` yourself. The arguments are those of :class:`~lightning_bd.datamodules.DiskDataModule`.

    Example:
        >>> TinyImageNetDataModule(root="/data").image_size
        64
    """

    default_image_size: ClassVar[int] = 64
    can_download: ClassVar[bool] = False

    def load(self, train: bool) -> FileImages:
        """Return the training images, or those of the validation part."""
        folder = self._require("tiny-imagenet-200")
        names = self._class_names(folder)
        labels = {wnid: label for label, wnid in enumerate(names)}
        samples = self._train_samples(folder, labels) if train else self._test_samples(folder, labels)
        paths, targets = zip(*samples, strict=True)
        return FileImages(folder, paths, torch.tensor(targets), tuple(names.values()), self.image_size)

    def _lines(self, folder: Path, name: str) -> list[str]:
        path = folder / name
        if not path.is_file():
            raise self._incomplete(folder, f"it has no file {name}")
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def _class_names(self, folder: Path) -> dict[str, str]:
        """Return the words of every class by its WordNet id, in sorted order."""
        words = dict(line.split("\t", 1) for line in self._lines(folder, "words.txt") if "\t" in line)
        wnids = sorted(line.strip() for line in self._lines(folder, "wnids.txt"))
        if not wnids:
            raise self._incomplete(folder, "wnids.txt lists no class")
        return {wnid: words.get(wnid, wnid).strip() for wnid in wnids}

    def _train_samples(self, folder: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
        samples = []
        for wnid, label in labels.items():
            files = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
            if not files:
                raise self._incomplete(folder, f"there is no image in train/{wnid}/images")
            samples += [(str(file.relative_to(folder)), label) for file in files]
        return samples

    def _test_samples(self, folder: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
        samples = []
        for line in self._lines(folder, "val/val_annotations.txt"):
            name, wnid, *_ = [*line.split("\t"), ""]
            if wnid.strip() not in labels:
                raise self._incomplete(
                    folder, f"val/val_annotations.txt gives {name} the class {wnid.strip()!r}, which wnids.txt lacks"
                )
            samples.append((f"val/images/{Path(name).name}", labels[wnid.strip()]))
        if not samples:
            raise self._incomplete(folder, "val/val_annotations.txt lists no image")
        return samples
