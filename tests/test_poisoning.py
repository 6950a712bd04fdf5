"""The choice of poisoned images against counts and loops."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_bd.batch import PoisonMode
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.label_maps import AllToAll, LabelMap, SourceSpecific
from lightning_bd.poisoning import Poison
from lightning_bd.selection import SampleScorer, Selection
from lightning_bd.triggers import BadNets

POSITIONS = torch.arange(500, 900)
LABELS = torch.arange(400) % 10


def prepared(
    rate: float = 0.1,
    target: int | LabelMap = 0,
    clean_label: bool = False,
    selection: list[int] | None = None,
    cover_rate: float = 0.0,
    seed: int = 0,
    cover_classes: list[int] | None = None,
) -> Poison:
    poison = Poison(
        BadNets(), rate, target, "static", clean_label, selection, seed, cover_rate, cover_classes=cover_classes
    )
    poison.prepare((3, 8, 8), num_classes=10)
    return poison


def test_static_choice_is_the_share_sorted_and_fixed() -> None:
    poisoned, covers = prepared(rate=0.1).choose(LABELS, POSITIONS, "inject")
    assert len(poisoned) == 40
    assert len(covers) == 0
    assert poisoned.tolist() == sorted(set(poisoned.tolist()) & set(POSITIONS.tolist()))
    again, _ = prepared(rate=0.1).choose(LABELS, POSITIONS, "inject")
    assert torch.equal(again, poisoned)


def test_static_choice_does_not_depend_on_the_order() -> None:
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    poison = prepared(rate=0.1, cover_rate=0.2)
    for one, other in zip(
        poison.choose(LABELS, POSITIONS, "a"), poison.choose(LABELS[order], POSITIONS[order], "a"), strict=True
    ):
        assert torch.equal(one, other)


def test_static_choice_depends_on_seed_and_split() -> None:
    chosen = [
        prepared(seed=seed).choose(LABELS, POSITIONS, split)[0].tolist()
        for seed, split in ((0, "inject"), (1, "inject"), (0, "defend"))
    ]
    assert len({tuple(choice) for choice in chosen}) == 3


def test_covers_are_other_images() -> None:
    poisoned, covers = prepared(rate=0.1, cover_rate=0.2).choose(LABELS, POSITIONS, "inject")
    assert (len(poisoned), len(covers)) == (40, 80)
    assert not set(poisoned.tolist()) & set(covers.tolist())


def test_covers_come_from_the_cover_classes() -> None:
    poison = prepared(rate=0.05, target=SourceSpecific([1], 0), cover_rate=0.2, cover_classes=[4, 7, 8])
    poisoned, covers = poison.choose(LABELS, POSITIONS, "inject")
    assert (len(poisoned), len(covers)) == (20, 80)
    assert set(LABELS[covers - 500].tolist()) == {4, 7, 8}
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    assert torch.equal(poison.choose(LABELS[order], POSITIONS[order], "inject")[1], covers)
    all_of_them = prepared(rate=0.05, target=SourceSpecific([1], 0), cover_rate=0.3, cover_classes=[4, 7, 8])
    assert len(all_of_them.choose(LABELS, POSITIONS, "inject")[1]) == 120


def test_all_cover_classes_are_none_named() -> None:
    named = prepared(cover_rate=0.3, cover_classes=list(range(10)))
    for one, other in zip(
        named.choose(LABELS, POSITIONS, "a"), prepared(cover_rate=0.3).choose(LABELS, POSITIONS, "a"), strict=True
    ):
        assert torch.equal(one, other)
    for one, other in zip(
        named.draw(LABELS, POSITIONS, keyed_generator(1)),
        prepared(cover_rate=0.3).draw(LABELS, POSITIONS, keyed_generator(1)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_covers_are_of_their_classes_though_some_images_are_poisoned() -> None:
    # 40 images of class 3; 20 of them are poisoned, so that 20 remain.
    poison = prepared(rate=0.05, target=SourceSpecific([3], 0), cover_rate=0.05, cover_classes=[3])
    poisoned, covers = poison.choose(LABELS, POSITIONS, "inject")
    assert sorted([*poisoned.tolist(), *covers.tolist()]) == POSITIONS[LABELS == 3].tolist()


def test_a_choice_without_covers_is_the_same_otherwise() -> None:
    poison = prepared(cover_rate=0.3)
    poisoned, covers = poison.choose(LABELS, POSITIONS, "inject", covers=False)
    assert torch.equal(poisoned, poison.choose(LABELS, POSITIONS, "inject")[0])
    assert len(covers) == 0


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (
            prepared(cover_rate=0.15, cover_classes=[4]),
            r"at least 60 images to cover in split `inject` \(cover_rate 0.15\), but only 3\d may be covered. "
            r"Lower `poison.cover_rate`, or name more classes than \[4\] in `poison.cover_classes`",
        ),
        (
            prepared(rate=0.6, cover_rate=0.002),
            r"to cover at least one image of split `inject`, but cover_rate 0.002 of 400 images selects none. Raise",
        ),
    ],
)
def test_refuses_a_cover_rate_without_images(poison: Poison, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison.choose(LABELS, POSITIONS, "inject")
    # What a dynamic poison draws is no count.
    poison.check_not_empty(LABELS, POSITIONS, "inject")
    poison.draw(LABELS, POSITIONS, keyed_generator(0))


def test_refuses_a_cover_rate_that_poisoned_images_leave_no_room_for(tmp_path: Path) -> None:
    poison = selecting(Brightness(), tmp_path, rate=1.0)
    poison.cover_rate = 0.95
    with pytest.raises(ValueError, match=r"at least 380 images .* but only 360 may be covered. Lower .*cover_rate`\.$"):
        poison.choose(LABELS, POSITIONS, "inject", read)


def test_refuses_cover_classes_without_images() -> None:
    rows = LABELS != 4
    poison = prepared(cover_rate=0.1, cover_classes=[4])
    message = r"images of `cover_classes` \[4\] in split `inject`, but there are none. Name other classes"
    with pytest.raises(ValueError, match=message):
        poison.check_not_empty(LABELS[rows], POSITIONS[rows], "inject")
    with pytest.raises(ValueError, match=message):
        poison.choose(LABELS[rows], POSITIONS[rows], "inject")


@pytest.mark.parametrize(("classes", "rate"), [([], 0.1), ([1], 0.0)])
def test_refuses_cover_classes_without_covers(classes: list[int], rate: float) -> None:
    with pytest.raises(ValueError, match=r"`cover_classes` to name classes, and `cover_rate` .* Give both, or leave"):
        Poison(BadNets(), cover_rate=rate, cover_classes=classes)


@pytest.mark.parametrize("label", [-1, 10, True, "1"])
def test_refuses_cover_classes_that_are_none(label: int) -> None:
    with pytest.raises(ValueError, match=r"`cover_classes` to hold classes in \[0, 10\), but got"):
        prepared(cover_rate=0.1, cover_classes=[2, label])


def test_refuses_covers_that_are_poisoned_images() -> None:
    with pytest.raises(ValueError, match=r"`cover_classes` not to name the target class 3 with `clean_label`"):
        prepared(clean_label=True, target=3, cover_rate=0.1, cover_classes=[2, 3])
    assert prepared(target=3, cover_rate=0.1, cover_classes=[2, 3]).cover_classes == [2, 3]


def test_clean_label_is_a_share_of_the_target_class() -> None:
    poisoned, _ = prepared(rate=0.5, target=3, clean_label=True).choose(LABELS, POSITIONS, "inject")
    assert len(poisoned) == 20
    assert (LABELS[poisoned - 500] == 3).all()


def test_source_specific_chooses_sources_alone() -> None:
    poisoned, _ = prepared(rate=0.1, target=SourceSpecific([2, 5], 0)).choose(LABELS, POSITIONS, "inject")
    assert len(poisoned) == 40
    assert set(LABELS[poisoned - 500].tolist()) == {2, 5}


def test_selection_limits_the_choice() -> None:
    selection = list(range(480, 560))
    poison = prepared(rate=0.1, selection=selection)
    poisoned, _ = poison.choose(LABELS, POSITIONS, "inject")
    assert len(poisoned) == 40
    assert set(poisoned.tolist()) <= set(selection)
    rows, _ = prepared(rate=0.5, selection=selection).draw(LABELS, POSITIONS, keyed_generator(0))
    assert 0 < len(rows) < 60
    assert set(POSITIONS[rows].tolist()) <= set(selection)


def test_dynamic_draw_is_bernoulli() -> None:
    poison = prepared(rate=0.1, cover_rate=0.2)
    draws = [poison.draw(LABELS, POSITIONS, keyed_generator(number)) for number in range(100)]
    counts = torch.tensor([len(rows) for rows, _ in draws], dtype=torch.float64)
    # 40,000 draws: standard deviation of the share 0.0015; of one batch's count sqrt(400 * 0.1 * 0.9) = 6.
    assert abs(float(counts.sum()) / 40_000 - 0.1) < 0.006
    assert 4.5 < float(counts.std()) < 7.5
    assert abs(sum(len(covers) for _, covers in draws) / 40_000 - 0.2) < 0.008
    assert all(not set(rows.tolist()) & set(covers.tolist()) for rows, covers in draws)
    seen = torch.zeros(400)
    for rows, _ in draws:
        seen[rows] += 1
    # Every image has its chance: 10 of 100 batches on average.
    assert (seen > 0).all()
    assert float(seen.max()) < 30


def test_dynamic_cover_rate_is_a_probability_among_the_cover_classes() -> None:
    poison = prepared(rate=0.3, target=SourceSpecific([1], 0), cover_rate=0.2, cover_classes=[2, 5])
    draws = [poison.draw(LABELS, POSITIONS, keyed_generator(number))[1] for number in range(100)]
    assert all(set(LABELS[rows].tolist()) <= {2, 5} for rows in draws)
    # 8,000 draws: standard deviation of the share 0.0045.
    assert abs(sum(len(rows) for rows in draws) / 8_000 - 0.2) < 0.018


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (1.0, 400)])
def test_dynamic_rate_at_its_ends(rate: float, count: int) -> None:
    rows, covers = prepared(rate=rate).draw(LABELS, POSITIONS, keyed_generator(0))
    assert (len(rows), len(covers)) == (count, 0)


def test_dynamic_draw_keeps_to_sources_and_target() -> None:
    rows, _ = prepared(rate=0.9, target=3, clean_label=True).draw(LABELS, POSITIONS, keyed_generator(0))
    assert set(LABELS[rows].tolist()) == {3}
    rows, _ = prepared(rate=0.9, target=SourceSpecific([2, 5], 0)).draw(LABELS, POSITIONS, keyed_generator(0))
    assert set(LABELS[rows].tolist()) == {2, 5}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3, [True, True, True, False, True]),
        (AllToAll(), [True, True, True, True, True]),
        (SourceSpecific([1, 2], 3), [False, True, True, False, False]),
    ],
)
def test_victims_do_not_have_the_attackers_label(target: int | LabelMap, expected: list[bool]) -> None:
    assert prepared(target=target).victims(torch.tensor([0, 1, 2, 3, 4])).tolist() == expected


def test_clean_label_attack_aims_at_the_other_classes() -> None:
    victims = prepared(target=3, clean_label=True).victims(torch.tensor([0, 3]))
    assert victims.tolist() == [True, False]


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_refuses_rates(rate: float) -> None:
    with pytest.raises(ValueError, match=r"`rate` to be a share in \[0, 1\], but got"):
        Poison(BadNets(), rate=rate)
    with pytest.raises(ValueError, match=r"`cover_rate` to be a share in \[0, 1\], but got"):
        Poison(BadNets(), cover_rate=rate)


def test_refuses_rates_that_exceed_one_together() -> None:
    with pytest.raises(ValueError, match=r"sum to at most 1, but got 0.6 \+ 0.5"):
        Poison(BadNets(), rate=0.6, cover_rate=0.5)


def test_refuses_mode() -> None:
    with pytest.raises(ValueError, match=r"`mode` to be one of \('static', 'dynamic'\), but got 'both'"):
        Poison(BadNets(), mode="both")  # type: ignore[arg-type]


def test_refuses_clean_label_without_one_target() -> None:
    with pytest.raises(ValueError, match="`target` to be one class with `clean_label`, but got a label map"):
        Poison(BadNets(), target=AllToAll(), clean_label=True)


def test_refuses_target_outside_the_classes() -> None:
    with pytest.raises(ValueError, match=r"`target` to be a class in \[0, 10\), but got 10"):
        prepared(target=10)


def test_refuses_trigger_larger_than_the_image() -> None:
    with pytest.raises(ValueError, match="at most the image's 8 x 8 pixels, but got 9 x 9"):
        Poison(BadNets(size=9)).prepare((3, 8, 8), 10)


def test_refuses_use_before_prepare() -> None:
    with pytest.raises(RuntimeError, match=r"Poison.prepare\(image_shape, num_classes\) must be called first"):
        Poison(BadNets()).attacker_labels(LABELS)


@pytest.mark.parametrize(
    ("poison", "count"),
    [
        (prepared(rate=0.0), 400),
        (prepared(rate=0.002), 400),
        (prepared(rate=0.02, clean_label=True), 40),
        (prepared(selection=[]), 0),
        (prepared(selection=[3]), 0),
    ],
)
def test_refuses_a_rate_that_selects_nothing(poison: Poison, count: int) -> None:
    message = rf"at least one image of split `inject`, but rate .* selects none \({count} may be poisoned\). Raise"
    with pytest.raises(ValueError, match=message):
        poison.check_not_empty(LABELS, POSITIONS, "inject")
    with pytest.raises(ValueError, match=message):
        poison.choose(LABELS, POSITIONS, "inject")


def test_refuses_a_rate_above_the_candidates() -> None:
    with pytest.raises(ValueError, match=r"at least 80 images .* split `inject` \(rate 0.2\), but only 40 may be"):
        prepared(rate=0.2, target=SourceSpecific([1], 0)).choose(LABELS, POSITIONS, "inject")


#: Constant images whose brightness falls with the position, so that the hardest are the first.
PIXELS = (200 - POSITIONS.remainder(200)).to(torch.uint8).view(400, 1, 1, 1).expand(400, 3, 8, 8)


class Brightness(SampleScorer):
    """Notes what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, set[int], int | None]] = []

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        self.seen.append((len(images), set(labels.tolist()), target))
        return images.double().mean(dim=(1, 2, 3))


class WholeSetBrightness(Brightness):
    needs_other_classes = True


def selecting(
    scorer: SampleScorer, folder: Path, rate: float = 0.1, clean_label: bool = True, target: int | LabelMap = 3
) -> Poison:
    poison = Poison(BadNets(), rate, target, "static", clean_label, Selection(scorer, cache_dir=folder))
    poison.prepare((3, 8, 8), num_classes=10)
    return poison


def read(positions: Tensor) -> Tensor:
    return PIXELS.index_select(0, positions - 500)


@pytest.mark.parametrize("kind", [Brightness, WholeSetBrightness])
def test_selection_takes_the_hardest_of_the_target_class(kind: type[Brightness], tmp_path: Path) -> None:
    scorer = kind()
    poison = selecting(scorer, tmp_path, rate=0.1)
    poisoned, _ = poison.choose(LABELS, POSITIONS, "inject", read)
    # Of 40 images int(0.1 * 40); brightness starts again at position 600, so that the brightest of class 3 is 603.
    assert poisoned.tolist() == [603, 613, 803, 813]
    seen = (40, {3}, 3) if kind is Brightness else (400, set(range(10)), 3)
    assert scorer.seen == [seen]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    again, _ = poison.choose(LABELS[order], POSITIONS[order], "other", read)
    assert torch.equal(again, poisoned)
    assert len(scorer.seen) == 1


def test_selection_without_clean_label_takes_any_class(tmp_path: Path) -> None:
    scorer = Brightness()
    poison = selecting(scorer, tmp_path, rate=0.02, clean_label=False, target=SourceSpecific([1, 2], 0))
    poisoned, _ = poison.choose(LABELS, POSITIONS, "inject", read)
    assert poisoned.tolist() == [601, 602, 611, 612, 801, 802, 811, 812]
    assert scorer.seen == [(80, {1, 2}, None)]


def test_covers_of_a_selection_are_other_images(tmp_path: Path) -> None:
    poison = selecting(Brightness(), tmp_path, rate=0.5)
    poison.cover_rate = 0.2
    poisoned, covers = poison.choose(LABELS, POSITIONS, "inject", read)
    assert (len(poisoned), len(covers)) == (20, 80)
    assert not set(poisoned.tolist()) & set(covers.tolist())


def test_a_fixed_poison_draws_the_chosen_images_always(tmp_path: Path) -> None:
    poison = selecting(Brightness(), tmp_path)
    poison.cover_rate = 0.3
    with pytest.raises(RuntimeError, match=r"Poison.fixed\(Poison.choose\(...\)\[0\]\) must be used to draw"):
        poison.draw(LABELS, POSITIONS, keyed_generator(0))
    fixed = poison.fixed(poison.choose(LABELS, POSITIONS, "inject", read)[0])
    for number in range(3):
        rows, covers = fixed.draw(LABELS, POSITIONS, keyed_generator(number))
        assert POSITIONS[rows].tolist() == [603, 613, 803, 813]
        assert 60 < len(covers) < 180
        assert not set(rows.tolist()) & set(covers.tolist())
    assert poison.is_fixed_choice
    assert not prepared().is_fixed_choice


def test_a_dynamic_poison_of_chosen_images_needs_no_number_of_covers(tmp_path: Path) -> None:
    poison = Poison(
        BadNets(2), selection=Selection(Brightness(), cache_dir=tmp_path), cover_rate=0.5, cover_classes=[4]
    )
    data = DigitsDataModule(poison, subset=300)
    phases = {mode: PhaseData("one", ("train",), mode) for mode in get_args(PoisonMode)}
    data.set_phase(phases["dynamic"])
    covered = sum(len(raw.cover_rows) for raw in data.train_dataloader() if raw.cover_rows is not None)
    assert 5 < covered <= 30
    manifest = data.manifest((phases["dynamic"],))
    assert manifest is not None
    assert len(manifest.tensors["indices.one"]) == 30
    with pytest.raises(ValueError, match="at least 150 images to cover in split `train`"):
        data.manifest((phases["static"],))


def test_selection_needs_the_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`read` to be given: `selection` chooses by what the images look like"):
        selecting(Brightness(), tmp_path).choose(LABELS, POSITIONS, "inject")


def test_selection_of_none_is_refused_before_scoring(tmp_path: Path) -> None:
    scorer = Brightness()
    with pytest.raises(ValueError, match=r"rate 0.02 of 40 images selects none \(40 may be poisoned\)"):
        selecting(scorer, tmp_path, rate=0.02).choose(LABELS, POSITIONS, "inject", read)
    assert not scorer.seen


@pytest.mark.parametrize("selection", [None, Selection(Brightness())])
def test_refuses_clean_label_of_a_class_without_images(selection: Selection | None) -> None:
    poison = Poison(BadNets(), 0.1, 3, "static", True, selection)
    poison.prepare((3, 8, 8), num_classes=10)
    rows = LABELS != 3
    message = "images of the target class 3 in split `inject`, which `clean_label` poisons, but there are none. Choose"
    with pytest.raises(ValueError, match=message):
        poison.check_not_empty(LABELS[rows], POSITIONS[rows], "inject")
    with pytest.raises(ValueError, match=message):
        poison.choose(LABELS[rows], POSITIONS[rows], "inject", read)
