"""Scores in a file."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_bd.callbacks.detection.score_table import COLUMNS, read_scores, write_scores
from lightning_bd.callbacks.detection.session import SetScores


def scores(index: list[int], values: list[float], poisoned: list[bool] | None = None) -> SetScores:
    place = torch.tensor(index)
    flags = None if poisoned is None else torch.tensor(poisoned)
    return SetScores(place, place % 3, place % 2, flags, torch.tensor(values))


def test_one_row_per_image_and_null_where_it_was_not_scored(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "scores.parquet"
    given = {
        "all": {"clean": scores([2, 0, 1], [0.2, 0.0, 0.1]), "far": scores([0, 1], [5.0, 6.0])},
        "some": {"clean": scores([1], [-1.0])},
        "train": {"train": scores([0, 4], [7.0, 8.0], [True, False])},
    }
    write_scores(path, given, "clean", {"key": "value"})
    table = pq.read_table(path)
    assert table.column_names == [*COLUMNS, "all", "some", "train"]
    assert table["set"].to_pylist() == ["clean"] * 3 + ["far"] * 2 + ["train"] * 2
    assert table["index"].to_pylist() == [0, 1, 2, 0, 1, 0, 4]
    assert table["label"].to_pylist() == [0, 1, 2, 0, 1, 0, 1]
    assert table["prediction"].to_pylist() == [0, 1, 0, 0, 1, 0, 0]
    assert table["positive"].to_pylist() == [False] * 3 + [True] * 2 + [True, False]
    assert table["some"].to_pylist() == [None, -1.0, None, None, None, None, None]
    assert table["all"].to_pylist()[:3] == pytest.approx([0.0, 0.1, 0.2])
    assert table.schema.metadata == {b"key": b"value"}


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    given = {"a": {"clean": scores([0, 2, 5], [0.5, 1.5, 2.5])}, "b": {"far": scores([1, 3], [3.5, 4.5])}}
    write_scores(path, given, "clean")
    found = read_scores(path)
    assert {name: list(sets) for name, sets in found.items()} == {"a": ["clean"], "b": ["far"]}
    for name, sets in given.items():
        for each, known in sets.items():
            for column in ("index", "label", "prediction", "score"):
                assert torch.equal(getattr(found[name][each], column), getattr(known, column))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    path.write_text("no")
    with pytest.raises(ValueError, match=r"Cannot read the scores .*scores\.parquet"):
        read_scores(path)
    pq.write_table(pa.table({"index": [1]}), path)
    with pytest.raises(ValueError, match="has no column set, label, prediction, positive"):
        read_scores(path)
