"""Surroundings of a run: fewer messages, a number of threads, a seed. Each is put back."""

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ("expected_warnings", "quiet", "seed_globals", "threads")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep each new Trainer from announcing the hardware and its limits again."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Leave out what Lightning warns of and what is meant to be so."""
    with warnings.catch_warnings():
        # Steps count over epochs, so short epochs are logged too.
        warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging")
        # No split `val`, no validation.
        warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
        # A cut phase goes on in its own folder.
        warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
        # A module of the user's need not validate.
        warnings.filterwarnings("ignore", message=r"You passed in a `val_dataloader` but have no `validation_step`")
        # Lightning 2.6 with torch 2.14 and later.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
        yield


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Use ``number`` threads for operators on the CPU inside the block; ``None`` leaves it as it is."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seed_globals(seed: int) -> None:
    """Seed the global states of Python, NumPy and torch, and nothing else.

    Lightning's ``seed_everything`` would also change the seed that the run is known by.

    Args:
        seed: At least 0.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
