"""Scores are computed once, and again when anything that they depend on changes."""

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_bd.cache import cache_folder
from lightning_bd.selection import KNNTypicality, MeanTypicality, RawPixels, SampleScorer, Selection
from lightning_bd.selection.cache import read_scores, write_scores

IMAGES = torch.randint(0, 256, (12, 1, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.zeros(12, dtype=torch.int64)


class Counting(SampleScorer):
    """Counts how often it is asked."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls = 0

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        self.calls += 1
        return images.double().mean(dim=(1, 2, 3)) * self.factor


def choose(selection: Selection, images: Tensor = IMAGES, labels: Tensor = LABELS) -> list[int]:
    found: list[int] = selection.choose(images, labels, 4, 0).tolist()
    return found


def test_scores_are_computed_once(cache: Path) -> None:
    first, second = Counting(), Counting()
    assert choose(Selection(first)) == choose(Selection(second)) == choose(Selection(second, "hardest"))
    assert (first.calls, second.calls) == (1, 0)
    assert [path.parent for path in cache.iterdir()] == [cache]


def test_the_table_can_be_read(cache: Path) -> None:
    selection = Selection(Counting())
    found = selection.choose(IMAGES, LABELS + 3, 4, 3, indices=torch.arange(50, 62))
    assert selection.table is not None
    assert selection.table.parent == cache
    assert selection.table.name.startswith("Counting-")
    with selection.table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "score", "rank"]
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))
    assert sorted(int(row["index"]) for row in rows[:4]) == (found + 50).tolist()
    assert {row["label"] for row in rows} == {"3"}
    for row in rows:
        assert float(row["score"]) == float(IMAGES[int(row["index"]) - 50].double().mean())


def test_equal_scores_share_a_rank(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    scores = torch.tensor([0.1, 0.7, 0.7, -1.0], dtype=torch.float64)
    write_scores(path, torch.arange(4), torch.zeros(4, dtype=torch.int64), scores)
    assert path.read_text().split() == ["index,label,score,rank", "1,0,0.7,1", "2,0,0.7,1", "0,0,0.1,3", "3,0,-1.0,4"]
    found = read_scores(path, torch.tensor([3, 1, 0, 2]), torch.zeros(4, dtype=torch.int64))
    assert found is not None
    assert found.tolist() == [-1.0, 0.7, 0.1, 0.7]


def test_whatever_scores_depend_on_makes_another_table(cache: Path) -> None:
    changed = IMAGES.clone()
    changed[3, 0, 1, 1] += 1
    labels = LABELS.clone()
    labels[3] = 1
    for images, given in ((IMAGES, LABELS), (changed, LABELS), (IMAGES, labels), (IMAGES.flip(0), LABELS)):
        choose(Selection(Counting()), images, given)
    choose(Selection(Counting(factor=2.0)))
    Selection(Counting()).choose(IMAGES, LABELS, 4, target=1)
    Selection(Counting()).choose(IMAGES, LABELS, 4, 0, indices=torch.arange(1, 13))
    Selection(Counting()).choose(IMAGES, LABELS, 4, 0, candidates=torch.arange(12) > 0)
    choose(Selection(KNNTypicality(RawPixels(), k=2)))
    choose(Selection(KNNTypicality(RawPixels(), k=3)))
    choose(Selection(MeanTypicality(RawPixels())))
    assert len(list(cache.iterdir())) == 11


def test_the_users_folder_is_used(tmp_path: Path, cache: Path) -> None:
    selection = Selection(Counting(), cache_dir=tmp_path / "mine")
    choose(selection)
    assert not cache.exists()
    assert [selection.table] == list((tmp_path / "mine").iterdir())


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder("selection") == tmp_path / "cache" / "selection"
    monkeypatch.delenv("LIGHTNING_BD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("selection") == tmp_path / ".cache" / "lightning_bd" / "selection"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("index,label", "index,labels"),
        (",12\n", ""),
        (",0,", ",x,"),
        (",0,", ",1,"),
        (",12\n", ",12\n99,0,1.0,13\n"),
    ],
)
def test_a_broken_table_is_made_anew(old: str, new: str) -> None:
    selection = Selection(Counting())
    expected = choose(selection)
    assert selection.table is not None
    text = selection.table.read_bytes().decode().replace("\r\n", "\n")
    assert old in text
    selection.table.write_text(text.replace(old, new, 1))
    again = Counting()
    with pytest.warns(UserWarning, match=r"The table of scores .* is broken and made anew: "):
        assert choose(Selection(again)) == expected
    assert again.calls == 1
    assert choose(Selection(again)) == expected
    assert again.calls == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'index,label,score,rank\n"', b"index,label,score,rank\n"])
def test_a_table_of_garbage_is_made_anew(content: bytes) -> None:
    selection = Selection(Counting())
    expected = choose(selection)
    assert selection.table is not None
    selection.table.write_bytes(content)
    with pytest.warns(UserWarning, match="is broken and made anew"):
        assert choose(selection) == expected


def test_a_score_that_is_not_finite_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("index,label,score,rank\n0,0,nan,1\n")
    with pytest.warns(UserWarning, match="a score is not finite"):
        assert read_scores(tmp_path / "t.csv", torch.tensor([0]), torch.tensor([0])) is None


def test_a_folder_that_cannot_be_written_is_no_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    selection = Selection(Counting(), cache_dir=tmp_path / "file")
    with pytest.warns(UserWarning, match=r"could not be kept for the next run: .* another `cache_dir`"):
        found = choose(selection)
    assert found == choose(Selection(Counting()))
    assert selection.table is None
