"""What a defender may see of the data."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_bd.batch import BatchContext, RawBatch
from lightning_bd.datamodules.images import ImageSet
from lightning_bd.datamodules.loader import Augment, BatchLoader, Place, place_of
from lightning_bd.datamodules.rendering import as_precision, render
from lightning_bd.datamodules.splits import stratified_splits

__all__ = ("DefenderView",)


class DefenderView(LightningDataModule):
    """The clean split of a defending phase, cut once more into training and validation, as ``(image, label)`` pairs.

    It holds the images of that split and nothing else: no poison, no test set, and no way back to the datamodule
    that made it, so that nothing a defense does can depend on the attack.

    Args:
        images: The clean images of the split.
        batch_size: Images per batch and process.
        augment: Augmentation of the training part.
        seed: Seed of order, augmentation and the cut.
        phase: Name of the defending phase.
        validation: Share held out for validation, in (0, 1), stratified by class.
        num_workers: Processes that decode files.

    Raises:
        ValueError: If a class has too few images to be in both parts.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        augment: Augment = "none",
        seed: int = 0,
        phase: str = "defend",
        validation: float = 0.2,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < validation < 1:
            raise ValueError(f"Expected argument `validation` to be a share in (0, 1), but got {validation}.")
        self.batch_size = batch_size
        self.num_classes = len(images.class_names)
        self.epoch_limit: int | None = None
        self._images = images
        self._parts = stratified_splits(images.labels, {"train": 1 - validation, "validation": validation}, seed)
        self._augment: Augment = augment
        self._seed = seed
        self._phase = phase
        self._num_workers = num_workers

    def train_dataloader(self) -> BatchLoader:
        """Return the training part, shuffled and augmented."""
        return self._loader("train")

    def val_dataloader(self) -> BatchLoader:
        """Return the validation part, in order, as it is."""
        return self._loader("validation")

    def batches(self, part: str, device: torch.device | str = "cpu", epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of finished ``(image, label)`` batches, the same on every process.

        Args:
            part: ``"train"`` or ``"validation"``.
            device: Where the batches are made.
            epoch: Part of the key of order and augmentation.
        """
        loader = self._loader(part)
        loader.place = lambda: Place(epoch)
        for raw in loader:
            yield self.on_after_batch_transfer(raw.to(device), 0)

    def on_after_batch_transfer(self, batch: object, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Finish a raw batch on its device."""
        if not isinstance(batch, RawBatch):
            raise TypeError(f"Expected a batch of this datamodule's loaders, but got {type(batch).__name__}.")
        sample = render(batch, None, self._padding)
        return as_precision(sample.image, self.trainer), sample.label

    @property
    def _padding(self) -> int:
        return max(1, self._images.image_shape[1] // 8)

    def _place(self) -> Place:
        return place_of(self.trainer)

    def _loader(self, part: str) -> BatchLoader:
        return BatchLoader(
            self._images,
            self._parts[part],
            BatchContext(self._phase, train=part == "train"),
            batch_size=self.batch_size,
            seed=self._seed,
            augment=self._augment,
            padding=self._padding,
            place=self._place,
            num_workers=self._num_workers,
        )
