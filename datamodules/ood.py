"""Test sets for detectors of what does not belong to a data set."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_bd.batch import AttackBatch, Sample
from lightning_bd.datamodules.base import ImageDataModule
from lightning_bd.datamodules.images import ImageSet
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.datamodules.unlabelled import JpegImages, UnlabelledImages, find_images

__all__ = ("OODDataModule", "ood_loader")


def ood_loader(datamodule: ImageDataModule, folder: Path, name: str, max_images: int | None = None) -> BatchLoader:
    """Return the images of a folder as a test set of another data set's datamodule.

    They have the size and channels of its images, label and original label -1, no poison, and as index their position
    among the folder's sorted files. ``datamodule.on_after_batch_transfer`` finishes their batches; under several
    processes each gets its share.

    Args:
        datamodule: Whose model is tested.
        folder: Searched for images, also the folders in it.
        name: Of the set, for messages.
        max_images: At most this many images, evenly spread over the sorted files; ``None`` for all.

    Raises:
        ValueError: If ``max_images`` is not positive.
        MisconfigurationException: If the folder is missing or holds no image.
    """
    _check_positive("max_images", max_images)
    images = UnlabelledImages(folder, find_images(folder), datamodule.image_shape)
    count = min(len(images), max_images or len(images))
    positions = torch.arange(count) * len(images) // count
    return datamodule.loaders.clean(images, name, positions)


class OODDataModule(LightningDataModule):
    """A data set's clean test images, then images of other data sets that a detector should tell from them.

    Near sets resemble the data set (other classes of photographs), far sets do not (digits, textures), as in
    `OpenOOD <https://arxiv.org/abs/2210.07242>`_. Each test loader is one set, in the order of :attr:`test_set_names`.

    Sets that were stored differently are told apart by the traces of that: a detector which sees the blocks of JPEG
    looks good on JPEG files against a data set without them. ``jpeg_quality`` gives all test images the same traces;
    compare the scores with and without.

    Args:
        id: The data set that the model was trained on; its poison is not used.
        near: Folder of images per name, for sets that are like it.
        far: Folder of images per name, for sets that are not.
        batch_size: Images per batch and process; ``None`` for that of ``id``.
        max_images: At most this many images of each other set, evenly spread over its sorted files.
        jpeg_quality: Write and read every test image as JPEG of this quality, in [1, 95], after it was resized;
            ``None`` leaves them as they are. What detectors are fitted on is never changed.

    Raises:
        ValueError: If an argument is out of its range, no other set is named, or two sets have one name.
        MisconfigurationException: When set up, if a folder is missing or holds no image.

    Example:
        >>> from lightning_bd.datamodules.digits import DigitsDataModule
        >>> data = OODDataModule(DigitsDataModule(), near={"letters": "/data/letters"}, far={"noise": "/data/noise"})
        >>> data.test_set_names
        ['id', 'letters', 'noise']
    """

    def __init__(
        self,
        id: ImageDataModule,
        near: dict[str, str] | None = None,
        far: dict[str, str] | None = None,
        batch_size: int | None = None,
        max_images: int | None = None,
        jpeg_quality: int | None = None,
    ) -> None:
        super().__init__()
        _check_positive("batch_size", batch_size)
        _check_positive("max_images", max_images)
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 95:
            raise ValueError(f"Expected argument `jpeg_quality` to be in [1, 95], but got {jpeg_quality}.")
        self.id = id
        self.near = near or {}
        self.far = far or {}
        self.batch_size = batch_size
        self.max_images = max_images
        self.jpeg_quality = jpeg_quality
        if not self.near and not self.far:
            raise ValueError("Expected `near` or `far` to name at least one folder of images, but both are empty.")
        names = self.test_set_names
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Expected `near` and `far` to have names of their own, but `{name}` is taken.")

    @property
    def near_names(self) -> list[str]:
        """Names of the sets that are like the data set."""
        return list(self.near)

    @property
    def far_names(self) -> list[str]:
        """Names of the sets that are not."""
        return list(self.far)

    @property
    def test_set_names(self) -> list[str]:
        """What each test loader holds: ``id``, then the near sets, then the far ones."""
        return ["id", *self.near, *self.far]

    def prepare_data(self) -> None:
        """Download the data set, where that was asked for."""
        self.id.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Load the data set, and look for the folders before anything is tested."""
        self.id.trainer = self.trainer  # it finishes the batches, in this Trainer's precision
        self.id.setup(stage)
        for folder in (*self.near.values(), *self.far.values()):
            find_images(Path(folder))

    def test_dataloader(self) -> list[BatchLoader]:
        """Return a loader for each of :attr:`test_set_names`."""
        self.setup("test")
        loaders = [self.id.loaders.clean(self.id.test_images, "id")]
        for name, folder in (*self.near.items(), *self.far.items()):
            loaders.append(ood_loader(self.id, Path(folder), name, self.max_images))
        for loader in loaders:
            loader.images = self._stored(loader.images)
            loader.batch_size = self.batch_size or loader.batch_size
        return loaders

    def clean_fit_dataloader(self) -> BatchLoader:
        """Return the data set's clean training images: what detectors are fitted on."""
        self.setup("fit")
        loader = self.id.clean_fit_dataloader()
        loader.batch_size = self.batch_size or loader.batch_size
        return loader

    def on_after_batch_transfer(
        self, batch: object, dataloader_idx: int
    ) -> Sample | AttackBatch | tuple[Tensor, Tensor]:
        """Finish a batch as the data set's own."""
        return self.id.on_after_batch_transfer(batch, dataloader_idx)

    def _stored(self, images: ImageSet) -> ImageSet:
        return images if self.jpeg_quality is None else JpegImages(images, self.jpeg_quality)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
