"""GTSRB: German traffic signs."""

import csv
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import GTSRB

from lightning_bd.datamodules.disk import DiskDataModule
from lightning_bd.datamodules.images import FileImages
from lightning_bd.datamodules.loader import Augment

__all__ = ("GTSRBDataModule",)

CLASSES = tuple(f"{label:05d}" for label in range(43))


class GTSRBDataModule(DiskDataModule):
    """26,640 training and 12,630 test traffic signs, 43 classes (`Stallkamp et al., 2012 <https://benchmark.ini.rub.de>`_).

    Torchvision's layout: ``root/gtsrb/GTSRB/Training/<class>/*.ppm``, ``root/gtsrb/GTSRB/Final_Test/Images/*.ppm`` and
    ``root/gtsrb/GT-final_test.csv``. Signs of 15 to 250 pixels are resized to ``image_size`` (the papers use 32). Not
    mirrored: signs have a side. The arguments are those of :class:`~lightning_bd.datamodules.DiskDataModule`.

    Example:
        >>> GTSRBDataModule(root="/data").augment
        'crop'
    """

    default_augment: ClassVar[Augment] = "crop"

    def prepare_data(self) -> None:
        """Download the data set if that was asked for and it is missing."""
        if self.download:
            for split in ("train", "test"):
                GTSRB(self.root, split=split, download=True)

    def load(self, train: bool) -> FileImages:
        """Return the training or the test images."""
        samples = self._train_samples() if train else self._test_samples()
        paths, labels = zip(*samples, strict=True)
        return FileImages(self.root, paths, torch.tensor(labels), CLASSES, self.image_size)

    def _train_samples(self) -> list[tuple[str, int]]:
        folder = self._require("gtsrb/GTSRB/Training")
        samples = []
        for label, name in enumerate(CLASSES):
            files = sorted((folder / name).glob("*.ppm"))
            if not files:
                raise self._incomplete(folder, f"there is no image of class {label} in {name}/")
            samples += [(str(file.relative_to(self.root)), label) for file in files]
        return samples

    def _test_samples(self) -> list[tuple[str, int]]:
        table, folder = self._require("gtsrb/GT-final_test.csv"), self._require("gtsrb/GTSRB/Final_Test/Images")
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
        try:
            samples = [(str(folder.relative_to(self.root) / Path(r["Filename"]).name), int(r["ClassId"])) for r in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise self._incomplete(table, f"a row lacks its Filename or ClassId ({error!r})") from error
        if not samples:
            raise self._incomplete(table, "it lists no image")
        return samples
