"""Adding up and joining what the processes of a distributed run have found."""

import torch
from torch import Tensor, distributed

__all__ = ("gather_over_processes", "share_of_process", "sum_over_processes")


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; the tensor itself in a single one.

    Args:
        tensor: Of the same shape in each.
    """
    if not _distributed():
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def gather_over_processes(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of the ranks; the tensor itself in a single one.

    Args:
        rows: ``(N, ...)``; N may differ between processes.
    """
    if not _distributed():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    # Collective operations take equal shapes only, and no booleans.
    padded = rows.new_zeros((longest, *rows.shape[1:]), dtype=torch.uint8 if rows.dtype is torch.bool else rows.dtype)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)]).to(rows.dtype)


def share_of_process(rows: Tensor, count: int, device: torch.device) -> Tensor:
    """Return this process's part of what :func:`gather_over_processes` joined.

    Args:
        rows: ``(N, ...)``, of all processes.
        count: Number of rows of this process.
        device: Where processes exchange tensors.
    """
    if not _distributed():
        return rows
    counts = gather_over_processes(torch.tensor([count], device=device)).tolist()
    start = sum(counts[: distributed.get_rank()])
    return rows[start : start + count]


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
