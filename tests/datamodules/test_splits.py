"""Splits against counts per class."""

import pytest
import torch

from lightning_bd.datamodules.splits import stratified_splits, stratified_subset

# Classes of unequal size: 40, 60, 80, 100.
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor([40, 60, 80, 100]))[
    torch.randperm(280, generator=torch.Generator().manual_seed(0))
]
FRACTIONS = {"inject": 0.85, "consolidate": 0.10, "defend": 0.05}


def test_splits_are_disjoint_complete_and_stratified() -> None:
    splits = stratified_splits(LABELS, FRACTIONS)
    assert list(splits) == list(FRACTIONS)
    together = torch.cat(list(splits.values()))
    assert together.sort().values.tolist() == list(range(280))
    for name, positions in splits.items():
        assert positions.tolist() == sorted(positions.tolist())
        for label, size in enumerate((40, 60, 80, 100)):
            count = int((LABELS[positions] == label).sum())
            assert abs(count - FRACTIONS[name] * size) <= 1, (name, label)


def test_the_rest_may_stay_unused() -> None:
    splits = stratified_splits(LABELS, {"a": 0.25, "b": 0.25})
    assert [len(part) for part in splits.values()] == [70, 70]
    assert not set(splits["a"].tolist()) & set(splits["b"].tolist())


def test_a_seed_gives_one_cut() -> None:
    first, again, other = (stratified_splits(LABELS, FRACTIONS, seed)["defend"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_class_is_shuffled_before_it_is_cut() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    first = stratified_splits(labels, {"a": 0.5, "b": 0.5})["a"]
    assert 30 < float(first.double().mean()) < 70
    assert first.tolist() != list(range(50))


@pytest.mark.parametrize("fractions", [{"a": 0.0}, {"a": -0.5}, {"a": 1.1}, {"a": float("nan")}])
def test_refuses_shares(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"split `a` to be a share in \(0, 1\], but got"):
        stratified_splits(LABELS, fractions)


def test_refuses_more_than_everything() -> None:
    with pytest.raises(ValueError, match=r"`splits` to sum to at most 1, but got 1.1: {'a': 0.6, 'b': 0.5}"):
        stratified_splits(LABELS, {"a": 0.6, "b": 0.5})


def test_refuses_no_split() -> None:
    with pytest.raises(ValueError, match="`splits` to name at least one split, but got none"):
        stratified_splits(LABELS, {})


def test_refuses_a_split_without_a_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 4)
    with pytest.raises(ValueError, match=r"split `b` \(0.1\) gets no image of class 1, which has 4\. Raise its share"):
        stratified_splits(labels, {"a": 0.9, "b": 0.1})


@pytest.mark.parametrize("size", [1, 2, 7, 28, 100, 279, 280])
def test_subset_is_in_proportion(size: int) -> None:
    chosen = stratified_subset(LABELS, size)
    assert len(set(chosen.tolist())) == size
    assert chosen.tolist() == sorted(chosen.tolist())
    for label, count in enumerate((40, 60, 80, 100)):
        assert abs(int((LABELS[chosen] == label).sum()) - size * count / 280) <= 1


def test_subset_has_a_seed() -> None:
    first, again, other = (stratified_subset(LABELS, 28, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [0, -1, 281])
def test_refuses_subset(size: int) -> None:
    with pytest.raises(ValueError, match=rf"`subset` to be in \[1, 280\], but got {size}"):
        stratified_subset(LABELS, size)
