"""What a Trainer gives detectors: the loaders it runs over with their names, clean data to fit on, parts of batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_bd.batch import RawBatch

__all__ = ("datamodule_of", "fit_batches", "images_of", "named_loaders", "parts_of", "set_names")


def named_loaders(trainer: Trainer) -> list[tuple[str, object]]:
    """Return the loaders of a test or prediction with the names of their places in dictionaries and lists."""
    return list(_flat("", trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders))


def _flat(name: str, loaders: object) -> Iterator[tuple[str, object]]:
    if isinstance(loaders, Mapping):
        for key, each in loaders.items():
            yield from _flat(f"{name}/{key}" if name else str(key), each)
    elif isinstance(loaders, list | tuple):
        for number, each in enumerate(loaders):
            yield from _flat(f"{name}/{number}" if name else f"set{number}", each)
    else:
        yield name or "set0", loaders


def set_names(trainer: Trainer) -> list[str]:
    """Return what the sets of a test or prediction are called, by the datamodule or else by their places."""
    names = [name for name, _ in named_loaders(trainer)]
    given = getattr(datamodule_of(trainer), "test_set_names", None) if trainer.testing else None
    return list(given) if given is not None and len(given) == len(names) else names


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """Return the datamodule of this call; ``trainer.datamodule`` may be that of an earlier one."""
    selector: Any = trainer._data_connector._datahook_selector
    datamodule: LightningDataModule | None = None if selector is None else selector.datamodule
    return datamodule


def images_of(loader: object, processes: int) -> int | None:
    """Return the number of images of a loader whose sampler repeats some so that all processes have equally many."""
    if processes == 1 or not isinstance(loader, DataLoader) or not isinstance(loader.dataset, Sized):
        return None
    return len(loader.dataset)


def parts_of(batch: object) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return images, labels, positions in the data set and flags of a batch; unknown labels are -1."""
    if isinstance(batch, Tensor):
        return batch, torch.full((len(batch),), -1), None, None
    if not isinstance(batch, Sequence) or not batch or not isinstance(batch[0], Tensor):
        raise MisconfigurationException(
            f"Detectors take batches of images and labels, `batch[0]` and `batch[1]`, but got {type(batch).__name__}."
        )
    images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.is_floating_point():
        labels = torch.full((len(images),), -1)
    index = getattr(batch, "index", None)
    return images, labels, index if isinstance(index, Tensor) else None, getattr(batch, "is_poisoned", None)


def fit_batches(
    trainer: Trainer, pl_module: LightningModule, source: Iterable[Any] | None, name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels to fit on, on the module's device and in its precision; each process gets its share."""
    datamodule = datamodule_of(trainer)
    if source is None:
        make = getattr(datamodule, "clean_fit_dataloader", None)
        if make is None:
            raise MisconfigurationException(
                f"`{name}` needs clean data to fit on. Pass `dataloader=...`, or test with a datamodule that has"
                " `clean_fit_dataloader()`."
            )
        loader: Iterable[Any] = _share(make(), trainer)
    else:
        loader = _share(source, trainer)
    convert = trainer.precision_plugin.convert_input
    for batch in loader:
        # A loader of the user's own knows nothing of the datamodule, unless it is one of the datamodule's.
        theirs = source is None or isinstance(batch, RawBatch)
        before, transfer, after = _transfer_hooks(pl_module, datamodule if theirs else None)
        images, labels, _, _ = parts_of(after(transfer(before(batch, 0), pl_module.device, 0), 0))
        if bool((labels < 0).any()):
            raise MisconfigurationException(
                f"`{name}` is fitted on images and their labels, `batch[1]` being (B,) integers, but got none."
            )
        yield convert(images), labels


def _share(source: Iterable[Any], trainer: Trainer) -> Iterable[Any]:
    """Return this process's batches of a loader that does not share them out itself."""
    sampler = getattr(source, "sampler", None)
    if trainer.world_size == 1 or isinstance(sampler, DistributedSampler) or hasattr(source, "place"):
        return source
    if isinstance(source, Sized) and len(source) < trainer.world_size:
        raise MisconfigurationException(
            f"There are {len(source)} batches to fit on for {trainer.world_size} processes. Use smaller batches."
        )
    return islice(source, trainer.global_rank, None, trainer.world_size)


def _transfer_hooks(pl_module: LightningModule, datamodule: LightningDataModule | None) -> list[Any]:
    """Return the hooks that finish a batch, of whom Lightning would call them."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return [
        getattr(datamodule if datamodule is not None and is_overridden(hook, datamodule) else pl_module, hook)
        for hook in hooks
    ]
