"""What the datamodules share that read a data set from a folder."""

from pathlib import Path
from typing import ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bd.datamodules.base import ImageDataModule
from lightning_bd.datamodules.loader import Augment
from lightning_bd.poisoning import Poison

__all__ = ("DiskDataModule",)


class DiskDataModule(ImageDataModule):
    """Base of the datamodules that read a data set from a folder.

    Before the images are used, ``prepare_data`` must have run where ``download`` is set; a Trainer calls it.

    Args:
        root: Folder that holds the data set.
        image_size: Height and width; images of another size are resized. ``None``: the data set's usual size.
        download: Fetch the data set into ``root`` if it is missing, where its source offers that.
        poison: The attacker's rule; ``None`` for clean data and no attack test set.
        splits: Share of the training set per named split.
        batch_size: Images per batch and process.
        subset: Use only this many training images, classes in proportion.
        test_subset: Use only this many test images, classes in proportion.
        augment: ``"none"``, ``"crop"`` or ``"crop_flip"``.
        batch_format: ``"sample"`` or ``"pair"``.
        split_seed: Seed of splits and subset.
        seed: Seed of order, augmentation and dynamic poison.
        num_workers: Processes that decode images which are too large for memory.
        in_memory: Decode all images once, or as batches need them; ``None`` decides by size.
        exclude: Training images that are trained on no more, or a file of them.

    Raises:
        ValueError: If an argument is out of its range, or ``download`` is set for a set without a source.
        MisconfigurationException: When loaded, if the data set is not where ``root`` says, or is incomplete.
    """

    default_image_size: ClassVar[int] = 32
    #: Whether ``download`` has a source.
    can_download: ClassVar[bool] = True

    def __init__(
        self,
        root: Path = Path("data"),
        image_size: int | None = None,
        download: bool = False,
        poison: Poison | None = None,
        splits: dict[str, float] | None = None,
        batch_size: int = 128,
        subset: int | None = None,
        augment: Augment | None = None,
        batch_format: Literal["sample", "pair"] = "sample",
        split_seed: int = 0,
        seed: int | None = None,
        num_workers: int = 0,
        in_memory: bool | None = None,
        test_subset: int | None = None,
        exclude: str | Path | list[int] | None = None,
    ) -> None:
        super().__init__(
            poison, splits, batch_size, subset, augment, batch_format, split_seed, seed, num_workers, in_memory,
            test_subset, exclude,
        )  # fmt: skip
        if image_size is not None and image_size < 1:
            raise ValueError(f"Expected argument `image_size` to be a positive integer, but got {image_size}.")
        if download and not self.can_download:
            raise ValueError(
                f"Expected argument `download` to be False, since {type(self).__name__} has no source to download "
                "from, but got True. Put the data set into `root` yourself."
            )
        self.root = Path(root)
        self.image_size = image_size or self.default_image_size
        self._sized = image_size is not None
        self.download = download

    def _require(self, path: str) -> Path:
        """Return ``root / path``, a file or folder of the data set's layout; refuse a root without it."""
        found = self.root / path
        if not found.exists():
            fix = f"Pass --data.root <folder that contains {path}>"
            if self.can_download:
                fix += " or --data.download true (without a Trainer, call `prepare_data` then)"
            raise MisconfigurationException(f"{type(self).__name__} found no {found.absolute()}. {fix}.")
        return found

    def _incomplete(self, path: Path, why: str) -> MisconfigurationException:
        """Describe a data set that is there, but not whole."""
        fix = "Remove it and pass --data.download true" if self.can_download else "Put the whole data set there"
        return MisconfigurationException(f"{type(self).__name__} cannot use {path.absolute()}: {why}. {fix}.")
