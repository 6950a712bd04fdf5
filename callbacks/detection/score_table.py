"""Scores as a table in a file: one row per image, one column per detector."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lightning_bd.callbacks.detection.session import SetScores
from lightning_bd.files import open_atomically

__all__ = ("COLUMNS", "read_scores", "write_scores")

#: Before the detectors' columns.
COLUMNS = ("index", "set", "label", "prediction", "positive")


def write_scores(
    path: Path,
    scores: Mapping[str, Mapping[str, SetScores]],
    in_distribution: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write scores as a Parquet table, so that it is either the old one or the whole new one.

    Columns: ``index`` (position in the set), ``set``, ``label`` (-1 if unknown), ``prediction``, ``positive`` (poisoned
    or out of distribution), and one of float32 per detector, null where it did not score the image. Rows are sorted by
    set, in the order given, and index.

    Args:
        path: The file; its folder is made.
        scores: Detector -> set -> scores.
        in_distribution: The set that is not positive.
        metadata: Written into the file's schema.
    """
    sets = list(dict.fromkeys(name for of_sets in scores.values() for name in of_sets))
    parts = [_table(name, {key: of[name] for key, of in scores.items() if name in of}, scores, name != in_distribution)
             for name in sets]  # fmt: skip
    table = pa.concat_tables(parts)
    table = table.replace_schema_metadata(dict(metadata or {}))
    with open_atomically(path) as file:
        pq.write_table(table, file)


def read_scores(path: Path) -> dict[str, dict[str, SetScores]]:
    """Read what :func:`write_scores` wrote.

    Args:
        path: The file.

    Returns:
        Detector -> set -> scores, of the images that it scored.

    Raises:
        ValueError: If the file is no such table.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"Cannot read the scores {path}: {error}") from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} is no table of scores: it has no column {', '.join(missing)}.")
    names = np.asarray(table["set"].to_pylist(), dtype=object)
    common = {name: table[name].to_numpy() for name in COLUMNS if name != "set"}
    found: dict[str, dict[str, SetScores]] = {}
    for detector in (name for name in table.column_names if name not in COLUMNS):
        values = table[detector].to_numpy(zero_copy_only=False)
        for name in dict.fromkeys(names):
            rows = np.flatnonzero((names == name) & ~np.isnan(values))
            if len(rows):
                index, label, prediction, positive = (torch.from_numpy(common[key][rows]) for key in common)
                score = torch.from_numpy(values[rows].astype(np.float32))
                found.setdefault(detector, {})[name] = SetScores(index, label, prediction, positive, score)
    return found


def _table(name: str, scores: Mapping[str, SetScores], columns: Mapping[str, object], positive: bool) -> pa.Table:
    index = np.unique(np.concatenate([each.index.numpy() for each in scores.values()]))
    label, prediction = np.full(len(index), -1, dtype=np.int64), np.full(len(index), -1, dtype=np.int64)
    positives = np.full(len(index), positive)
    values = {}
    for detector in columns:
        values[detector] = np.full(len(index), np.nan, dtype=np.float32)
        if detector not in scores:
            continue
        each = scores[detector]
        rows = np.searchsorted(index, each.index.numpy())
        label[rows], prediction[rows] = each.label.numpy(), each.prediction.numpy()
        if each.poisoned is not None:
            positives[rows] = each.poisoned.numpy()
        values[detector][rows] = each.score.numpy()
    arrays = {
        "index": pa.array(index),
        "set": pa.array([name] * len(index), pa.string()),
        "label": pa.array(label),
        "prediction": pa.array(prediction),
        "positive": pa.array(positives),
        **{detector: pa.array(value, from_pandas=True) for detector, value in values.items()},
    }
    return pa.table(arrays)
