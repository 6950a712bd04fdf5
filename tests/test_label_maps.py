"""Label maps against tables written by hand."""

import pytest
import torch

from lightning_bd.label_maps import AllToAll, AllToOne, LabelMap, SourceSpecific

LABELS = torch.tensor([0, 1, 2, 3, 3])


@pytest.mark.parametrize(
    ("rule", "labels", "sources"),
    [
        (AllToOne(2), [2, 2, 2, 2, 2], [True, True, True, True, True]),
        (AllToAll(), [1, 2, 3, 0, 0], [True, True, True, True, True]),
        (AllToAll(3), [3, 0, 1, 2, 2], [True, True, True, True, True]),
        (AllToAll(-1), [3, 0, 1, 2, 2], [True, True, True, True, True]),
        (SourceSpecific([3, 1], 0), [0, 0, 2, 0, 0], [False, True, False, True, True]),
    ],
)
def test_maps(rule: LabelMap, labels: list[int], sources: list[bool]) -> None:
    rule.validate(4)
    mapped = rule(LABELS, 4)
    assert mapped.tolist() == labels
    assert mapped.dtype == torch.int64
    assert rule.sources(LABELS).tolist() == sources
    assert LABELS.tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("rule", [AllToOne(2), AllToAll(3), SourceSpecific([3, 1], 0)])
def test_describe_holds_the_arguments(rule: LabelMap) -> None:
    twin = type(rule)(**rule.describe())
    assert torch.equal(twin(LABELS, 4), rule(LABELS, 4))
    assert twin.describe() == rule.describe()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (AllToOne(4), r"`target` to be a class in \[0, 4\), but got 4"),
        (AllToOne(-1), r"`target` to be a class in \[0, 4\), but got -1"),
        (AllToOne("0"), r"`target` to be an integer, but got '0'"),  # type: ignore[arg-type]
        (AllToOne(True), r"`target` to be an integer, but got True"),
        (AllToAll(0), r"`shift` not to be a multiple of the 4 classes, but got 0"),
        (AllToAll(-8), r"`shift` not to be a multiple of the 4 classes, but got -8"),
        (AllToAll(1.5), r"`shift` to be an integer, but got 1.5"),  # type: ignore[arg-type]
        (SourceSpecific([1, 7], 0), r"`sources` to be a class in \[0, 4\), but got 7"),
        (SourceSpecific([1], 9), r"`target` to be a class in \[0, 4\), but got 9"),
    ],
)
def test_refuses_what_is_no_class(rule: LabelMap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule.validate(4)


@pytest.mark.parametrize("sources", [[], [1, 0]])
def test_refuses_sources_with_the_target(sources: list[int]) -> None:
    with pytest.raises(ValueError, match="`sources` to name classes other than the target 0, but got"):
        SourceSpecific(sources, 0)
