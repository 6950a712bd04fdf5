"""Random generators keyed by what they are for, independent of the global state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ("keyed_generator", "keyed_global_state", "keyed_seed")


def keyed_seed(*key: int | str) -> int:
    """Turn a key such as ``(seed, phase, epoch, batch, rank)`` into a 63-bit seed.

    Keys that differ in any part give unrelated seeds; ``1`` and ``"1"`` differ.

    Args:
        key: Integers and strings.

    Example:
        >>> keyed_seed(0, "inject", 3) == keyed_seed(0, "inject", 3)
        True
        >>> keyed_seed(0, "inject", 3) == keyed_seed(0, "inject", 4)
        False
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by :func:`keyed_seed`.

    Args:
        key: Integers and strings.

    Example:
        >>> first, second = (torch.rand(2, generator=keyed_generator(0, "a")) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    return torch.Generator().manual_seed(keyed_seed(*key))


@contextmanager
def keyed_global_state(*key: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of the CPU and of one CUDA device by :func:`keyed_seed`, and put them back after.

    For what draws from nothing else, such as a network's initial weights or its dropout. Those of other devices stay as
    they are, which ``torch.manual_seed`` would seed too.

    Args:
        key: Integers and strings.
        device: The device that draws beside the CPU.

    Example:
        >>> before = torch.get_rng_state()
        >>> with keyed_global_state(0, "weights"):
        ...     first = torch.rand(2)
        >>> with keyed_global_state(0, "weights"):
        ...     torch.equal(torch.rand(2), first)
        True
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    seed = keyed_seed(*key)
    on_cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
