"""Tables of scores that were computed before."""

import csv
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_bd.cache import content_key
from lightning_bd.description import Description
from lightning_bd.files import write_text_atomically

__all__ = ("fingerprint", "read_scores", "write_scores")

_COLUMNS = ["index", "label", "score", "rank"]
#: Part of every fingerprint; to be raised when the same arguments give other scores.
_VERSION = 1


def fingerprint(
    scorer: Description,
    target: int | None,
    digests: Sequence[bytes],
    labels: Tensor,
    indices: Tensor,
    candidates: Tensor,
) -> str:
    """Return the SHA-256 hex digest of all that scores depend on, and of what their table shows.

    Args:
        scorer: The scorer with its arguments and its encoder.
        target: The attacker's class.
        digests: Of the ``N`` images.
        labels: ``(N,)`` int64.
        indices: ``(N,)`` int64, positions in the data set.
        candidates: ``(N,)`` bool, which images are in the table.
    """
    facts = {"version": _VERSION, "scorer": scorer, "target": target, "images": len(digests)}
    return content_key(facts, digests, labels, indices, candidates)


def write_scores(path: Path, indices: Tensor, labels: Tensor, scores: Tensor) -> None:
    """Write a table, the hardest image first, so that it is either there as a whole or not at all.

    Args:
        path: Where; its folder is made.
        indices: ``(N,)`` int64, positions in the data set.
        labels: ``(N,)`` int64.
        scores: ``(N,)`` float64. The highest has rank 1; equal ones share a rank.
    """
    ordered, order = scores.sort(descending=True, stable=True)
    # Rank: one more than the number of images that are harder.
    ranks = torch.searchsorted(ordered.neg(), ordered.neg()) + 1
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    columns = (indices[order].tolist(), labels[order].tolist(), ordered.tolist(), ranks.tolist())
    writer.writerows(zip(*columns, strict=True))
    write_text_atomically(path, text.getvalue())


def read_scores(path: Path, indices: Tensor, labels: Tensor) -> Tensor | None:
    """Read a table that :func:`write_scores` wrote; a broken one is left to be written anew, with a warning.

    Args:
        path: The table.
        indices: ``(N,)`` int64, positions in the data set that it must be of.
        labels: ``(N,)`` int64, and their labels.

    Returns:
        ``(N,)`` float64 in the order of ``indices``; ``None`` if there is no such table.
    """
    if not path.exists():
        return None
    try:
        return _parsed(path, indices.tolist(), labels.tolist())
    # ValueError: a cell is no number, or the text is no UTF-8.
    except (OSError, ValueError, csv.Error) as error:
        warnings.warn(f"The table of scores {path} is broken and made anew: {error}", stacklevel=2)
        return None


def _parsed(path: Path, indices: list[int], labels: list[int]) -> Tensor:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    if not rows or rows[0] != _COLUMNS:
        raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
    if not all(len(row) == len(_COLUMNS) for row in rows):
        raise ValueError("a row is cut off")
    found = {int(index): (int(label), float(score)) for index, label, score, _ in rows[1:]}
    if len(rows) - 1 != len(indices) or {i: label for i, (label, _) in found.items()} != dict(
        zip(indices, labels, strict=True)
    ):
        raise ValueError("it is not of these images")
    scores = [found[index][1] for index in indices]
    if not all(math.isfinite(score) for score in scores):
        raise ValueError("a score is not finite")
    return torch.tensor(scores, dtype=torch.float64)
