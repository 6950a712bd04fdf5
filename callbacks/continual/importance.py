"""Measuring how much each weight matters, on data of the previous task."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_bd.callbacks.continual.reference import ReferenceKind, check_reference, reference_batches

__all__ = ("accumulate", "check_measurement", "mean_over_reference")


def check_measurement(
    num_samples: int | None, chunk_size: int | None, max_memory: int | None, gamma: float | None, reference: str
) -> None:
    """Raise ``ValueError`` if an argument that the measuring callbacks share is out of range."""
    for name, value in (("num_samples", num_samples), ("chunk_size", chunk_size), ("max_memory", max_memory)):
        if value is not None and value < 1:
            raise ValueError(f"Expected argument `{name}` to be a positive integer or None, but got {value}.")
    if gamma is not None and not 0 <= gamma <= 1:
        raise ValueError(f"Expected argument `gamma` to be in [0, 1] or None, but got {gamma}.")
    check_reference(reference)


def mean_over_reference(
    trainer: Trainer,
    pl_module: LightningModule,
    sums: Callable[[Iterator[tuple[Tensor, Tensor]], int | None], tuple[dict[str, Tensor], int]],
    *,
    name: str,
    noun: str,
    num_samples: int | None,
    dataloader: Iterable[Any] | None,
    reference: ReferenceKind,
) -> dict[str, Tensor]:
    """Return the mean of a quantity over the previous task's samples of all processes.

    The global random state is left as it was.

    Args:
        trainer: The trainer that is fitting.
        pl_module: The module that is fitted.
        sums: Called with this process's batches and the number of samples to take, or None for all; returns the sums
            by parameter name and the number of samples taken.
        name: Which callback measures, for messages.
        noun: What it measures, for messages.
        num_samples: Samples to take, all processes together; None takes all.
        dataloader: Batches of the previous task; None takes them from the datamodule.
        reference: Which of the datamodule's batches.

    Raises:
        MisconfigurationException: If there is no sample.
    """
    rank, size = trainer.global_rank, trainer.world_size
    rank_zero_info(f"`{name}` measures the {noun} of the weights to be anchored.")
    start = time.perf_counter()
    share = None if num_samples is None else num_samples // size + (rank < num_samples % size)
    with isolate_rng():
        totals, count = sums(reference_batches(trainer, pl_module, dataloader, name, reference), share)
    total = int(trainer.strategy.reduce(torch.tensor(count, device=pl_module.device), reduce_op="sum"))
    if total == 0:
        raise MisconfigurationException(
            f"`{name}` got no sample to measure the {noun} on. Pass a `dataloader` that is not empty (nor exhausted,"
            " if it is an iterator)."
        )
    means = {key: trainer.strategy.reduce(value, reduce_op="sum").div_(total) for key, value in totals.items()}
    rank_zero_info(f"Measured on {total} samples in {time.perf_counter() - start:.1f} s.")
    return means


def accumulate(new: Mapping[str, Tensor], earlier: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """Return ``gamma * earlier + new``, where a tensor that one of them lacks is zero.

    Args:
        new: Importance by parameter name.
        earlier: That of earlier tasks; a parameter that was trained then may be frozen now.
        gamma: What is kept of it, in [0, 1].

    Example:
        >>> accumulate({"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0), "b": torch.tensor(4.0)}, gamma=0.5)
        {'a': tensor(2.), 'b': tensor(2.)}
    """
    total = {name: gamma * tensor for name, tensor in earlier.items()}
    for name, tensor in new.items():
        total[name] = total[name] + tensor if name in total else tensor
    return total
