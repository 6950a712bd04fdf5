"""Any data set that lies on disk as one folder per class."""

from pathlib import Path
from typing import ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_bd.datamodules.disk import DiskDataModule
from lightning_bd.datamodules.image_tree import INCOMPLETE, ORDER, read_order
from lightning_bd.datamodules.images import FileImages
from lightning_bd.description import describe, differences
from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison

__all__ = ("ImageFolderDataModule",)


class ImageFolderDataModule(DiskDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``.

    Classes are the folders' names, sorted, and must be the same in both parts. Files are those with an image's
    extension (jpg, jpeg, png, ppm, bmp, pgm, tif, tiff, webp), in sorted order; all are resized to ``image_size``. The
    arguments are those of :class:`~lightning_bd.datamodules.DiskDataModule`.

    A folder that ``lightning-bd poison`` wrote has a file ``images.json``: its images are read in the order, the number
    of channels and, unless ``image_size`` is given, the size that it names. A trigger that is learnt from images is not
    learnt from these, which are poisoned, but taken from the folder's manifest.

    Example:
        >>> ImageFolderDataModule(root="/data/flowers", image_size=64).image_size
        64
    """

    can_download: ClassVar[bool] = False

    def load(self, train: bool) -> FileImages:
        """Return the training or the test images."""
        if (self.root / INCOMPLETE).exists():
            raise self._incomplete(self.root, f"it was not written to its end, and has a file {INCOMPLETE}")
        classes = self._classes()
        part = "train" if train else "test"
        order = read_order(self.root)
        found = [f"{name}/{file}" for name in classes for file in self._files(part, name, empty=order is not None)]
        if order is None:
            files, grey = found, False
        else:
            files, grey = list(order.files[part]), order.image_shape[0] == 1
            self._check_order(part, files, found)
            if not self._sized:
                self.image_size = order.image_shape[1]
        numbers = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([numbers[file.partition("/")[0]] for file in files])
        return FileImages(self.root, [f"{part}/{file}" for file in files], labels, classes, self.image_size, grey)

    def restore_trigger(self, poison: Poison) -> None:
        """Take the trigger from the manifest of a folder that ``lightning-bd poison`` wrote.

        Args:
            poison: The rule; its trigger has yet to be learnt.

        Raises:
            MisconfigurationException: If the folder has none, or names another trigger.
        """
        if read_order(self.root) is None:
            return
        name, mine = type(poison.trigger).__name__, self.manifest(learn=False)
        assert mine is not None
        refused = f"`{name}` is not learnt from the images in {self.root.absolute()}, which are poisoned already"
        try:
            manifest = PoisonManifest.load(self.root)
            found = [
                line
                for field in ("trigger", "image_shape")
                for line in differences(describe(getattr(manifest, field)), describe(getattr(mine, field)), field)
            ]
            if not found:
                manifest.restore(poison.trigger)
        except ValueError as error:
            raise MisconfigurationException(
                f"{refused}, and the trigger that they have cannot be taken over: {error}\nRestore `manifest.json` and "
                "`manifest.safetensors` as `lightning-bd poison` wrote them, or leave `data.poison` out."
            ) from error
        if found:
            raise MisconfigurationException(
                f"{refused}, and the trigger that they have is not the config's:\n  " + "\n  ".join(found)
                + "\n(folder against config). Give the trigger that they have, or leave `data.poison` out."
            )  # fmt: skip

    def _files(self, part: str, name: str, empty: bool) -> list[str]:
        folder = self.root / part / name
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
        if not files and not empty:
            raise self._incomplete(folder, f"it holds no image ({', '.join(IMG_EXTENSIONS)})")
        return [file.name for file in files]

    def _check_order(self, part: str, files: list[str], found: list[str]) -> None:
        """Refuse an order that is not one of the files that are there."""
        if len(set(files)) < len(files):
            raise self._incomplete(self.root / ORDER, f"it names a file of {part}/ twice")
        for wrong, why in ((set(files) - set(found), "is not there"), (set(found) - set(files), "is not in the list")):
            if wrong:
                raise self._incomplete(
                    self.root, f"{part}/{min(wrong)} {why} ({ORDER} lists the images; {len(wrong)} such files)"
                )

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
