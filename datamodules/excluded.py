"""Training images that are left out, such as those that a detector found suspicious."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bd.files import write_text_atomically

__all__ = ("excluded_positions", "read_excluded", "write_excluded")


def write_excluded(path: Path, sha256: str, excluded: Sequence[int], detector: str, keep: float) -> None:
    """Write which training images to leave out, for the argument ``exclude`` of a datamodule.

    Args:
        path: The JSON file to write; replaced as a whole if it exists.
        sha256: ``ImageDataModule.fingerprint()`` of the data set that the positions are of.
        excluded: Positions in the training set.
        detector: What found them.
        keep: Share of the images that stay, in (0, 1].

    Raises:
        ValueError: If a position is negative or ``keep`` is out of its range.
    """
    if any(position < 0 for position in excluded):
        raise ValueError(f"Expected argument `excluded` to hold non-negative positions, but got {min(excluded)}.")
    if not 0 < keep <= 1:
        raise ValueError(f"Expected argument `keep` to be a share in (0, 1], but got {keep}.")
    positions = sorted({int(position) for position in excluded})
    facts = {"sha256": sha256, "detector": detector, "keep": keep, "excluded": positions}
    write_text_atomically(path, json.dumps(facts) + "\n")


def read_excluded(path: Path, sha256: str) -> list[int]:
    """Read which training images to leave out.

    Args:
        path: A JSON file ``{"sha256": ..., "excluded": [...]}``; other keys are ignored.
        sha256: Fingerprint of the data set that they are to be left out of.

    Raises:
        MisconfigurationException: If the file is missing, broken, or was made for another data set.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_excluded(Path(folder) / "excluded.json", "abc", [7, 2], detector="CTM", keep=0.9)
        ...     read_excluded(Path(folder) / "excluded.json", "abc")
        [2, 7]
    """
    fix = "Write it anew, or correct `exclude`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MisconfigurationException(
            f"Cannot read the file of excluded images {path.absolute()}: {error.strerror}. {fix}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise MisconfigurationException(
            f"The file of excluded images {path.absolute()} is not JSON: {error}. {fix}."
        ) from error
    positions = found.get("excluded") if isinstance(found, dict) else None
    if not isinstance(positions, list) or not all(type(position) is int for position in positions):
        raise MisconfigurationException(
            f"The file of excluded images {path.absolute()} has no list of integers `excluded`. {fix}."
        )
    if found.get("sha256") != sha256:
        raise MisconfigurationException(
            f"The file of excluded images {path.absolute()} was made for another data set: its SHA-256 is "
            f"{found.get('sha256')}, that of this training set (after `subset`) is {sha256}. {fix}."
        )
    return positions


def excluded_positions(
    exclude: str | Path | Sequence[int] | None, count: int, fingerprint: Callable[[], str]
) -> Tensor:
    """Return the positions that a datamodule's argument ``exclude`` names.

    Args:
        exclude: A file, positions, or ``None`` for none.
        count: Number of training images.
        fingerprint: Returns that of the training set; asked only if there is a file.

    Returns:
        ``(E,)`` int64, sorted, each once.

    Raises:
        ValueError: If a given position is not in [0, count).
        MisconfigurationException: If the file is missing, broken, not of this data set, or a position is not in it.
    """
    if exclude is None:
        return torch.empty(0, dtype=torch.int64)
    path: Path | None = None
    if isinstance(exclude, str | Path):
        path = Path(exclude)
        positions: Sequence[int] = read_excluded(path, fingerprint())
    else:
        positions = exclude
    wrong = [position for position in positions if not 0 <= position < count]
    if wrong and path is not None:
        raise MisconfigurationException(
            f"The file of excluded images {path.absolute()} names image {wrong[0]}, which is not in [0, {count})."
        )
    if wrong:
        raise ValueError(f"Expected argument `exclude` to hold positions in [0, {count}), but got {wrong[0]}.")
    return torch.tensor(sorted(set(positions)), dtype=torch.int64)
