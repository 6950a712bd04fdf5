"""Training images that are left out: what goes, and that nothing else moves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bd.batch import PoisonMode, Sample
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule, ImageFolderDataModule, PhaseData
from lightning_bd.datamodules.excluded import read_excluded, write_excluded
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets, WaNet

SPLITS = {"inject": 0.6, "defend": 0.3, "val": 0.1}
STATIC = PhaseData("inject", ("inject",), "static")
DEFEND = PhaseData("defend", ("defend",))
EXCLUDED = list(range(5, 1400, 3))


def digits(
    exclude: str | Path | list[int] | None = None, subset: int | None = None, misaligned: bool = False
) -> DigitsDataModule:
    poison = Poison(WaNet(), 0.2, mode="static", cover_rate=0.2, misaligned_flags=misaligned)
    return DigitsDataModule(poison, SPLITS, subset=subset, seed=0, exclude=exclude)


def finished(data: ImageDataModule, loader: BatchLoader) -> Sample:
    """Return one epoch as one sample, in the order of the data set."""
    samples = [cast(Sample, data.on_after_batch_transfer(batch, 0)) for batch in loader]
    joined = Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))
    order = joined.index.argsort()
    return Sample(*(part[order] for part in joined))


def assert_equal(one: Sample, other: Sample) -> None:
    for name, mine, theirs in zip(Sample._fields, one, other, strict=True):
        assert torch.equal(mine, theirs), name


def without(sample: Sample) -> Sample:
    keep = ~torch.isin(sample.index, torch.tensor(EXCLUDED))
    return Sample(*(part[keep] for part in sample))


@pytest.mark.parametrize("misaligned", [False, True])
def test_the_images_that_remain_are_those_of_before(misaligned: bool) -> None:
    before, after = digits(misaligned=misaligned), digits(EXCLUDED, misaligned=misaligned)
    for data in (before, after):
        data.set_phase(STATIC)
    for loader in ("train_dataloader", "clean_fit_dataloader"):
        expected = without(finished(before, getattr(before, loader)()))
        found = finished(after, getattr(after, loader)())
        assert_equal(found, expected)
        assert 0 < len(found.index) < len(before.positions(("inject",)))
    assert finished(after, after.train_dataloader()).is_poisoned.any()
    assert after.fingerprint() == before.fingerprint()
    assert torch.equal(after.train_images.labels, before.train_images.labels)


def test_excluding_nothing_is_the_plain_run() -> None:
    plain, empty = digits(), digits([])
    for data in (plain, empty):
        data.set_phase(DEFEND, STATIC)
    for one, other in zip(plain.train_dataloader(), empty.train_dataloader(), strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.images, other.images)
    for name in ("train", "replay"):
        mine, theirs = (
            finished(d, d.train_dataloader())
            if name == "train"
            else torch.cat([cast(Sample, batch).image for batch in d.reference_batches()])
            for d in (plain, empty)
        )
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert plain.manifest((STATIC,)) is not None
    assert plain.manifest((STATIC,)).dataset == empty.manifest((STATIC,)).dataset  # type: ignore[union-attr]


def test_every_way_to_train_leaves_them_out() -> None:
    data = digits(EXCLUDED)
    gone = set(EXCLUDED)
    for names in ((), ("inject",), ("defend",), ("inject", "defend"), ("val",)):
        positions = data.positions(names)
        assert not gone & set(positions.tolist())
        assert torch.equal(positions, positions.sort().values)
    data.set_phase(DEFEND, STATIC)
    for clean in (False, True):
        indices = torch.cat([cast(Sample, batch).index for batch in data.reference_batches(clean=clean)])
        assert not gone & set(indices.tolist())
        assert len(indices) in (len(data.positions(("inject",))), len(data.positions(("inject",))) - 1)
    dynamic = replace(STATIC, poison="dynamic")
    data.set_phase(dynamic)
    assert not gone & set(finished(data, data.train_dataloader()).index.tolist())


def test_the_defender_has_the_images_that_remain() -> None:
    data = digits(EXCLUDED)
    data.augment = "none"
    view = data.defender_view(DEFEND)
    images = torch.cat([image for part in ("train", "validation") for image, _ in view.batches(part)])
    expected = data.train_images.read(data.positions(("defend",))).float() / 255
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(expected.flatten(1).sum(1).tolist())
    assert len(expected) < len(digits().positions(("defend",)))


def test_evaluation_is_of_the_whole_sets() -> None:
    before, after = digits(), digits(EXCLUDED)
    for one, other in zip(
        [*before.val_dataloader(), *before.test_dataloader()],
        [*after.val_dataloader(), *after.test_dataloader()],
        strict=True,
    ):
        assert_equal(finished(before, one), finished(after, other))


def test_the_manifest_lists_the_poison_that_was_trained_on() -> None:
    before, after = digits().manifest((STATIC,)), digits(EXCLUDED).manifest((STATIC,))
    assert before is not None
    assert after is not None
    every = set(before.tensors["indices.inject"].tolist())
    assert every & set(EXCLUDED)
    assert set(after.tensors["indices.inject"].tolist()) == every - set(EXCLUDED)
    assert after.dataset == {**before.dataset, "excluded": len(EXCLUDED)}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_filter_that_finds_all_the_poison_is_no_error(mode: PoisonMode) -> None:
    poison = Poison(BadNets(size=2), 0.1, mode=mode, selection=list(range(200)))
    data = DigitsDataModule(poison, seed=0, exclude=list(range(200)))
    data.set_phase(PhaseData("fit", (), mode))
    assert not finished(data, data.train_dataloader()).is_poisoned.any()


def test_a_file_is_the_same_as_its_positions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "excluded.json"
    write_excluded(path, digits(subset=300).fingerprint(), [9, 3, 9, 250], detector="CTM", keep=0.98)
    assert json.loads(path.read_text()) == {
        "sha256": digits(subset=300).fingerprint(), "detector": "CTM", "keep": 0.98, "excluded": [3, 9, 250],
    }  # fmt: skip
    assert [entry.name for entry in path.parent.iterdir()] == ["excluded.json"]
    for given in (path, str(path)):
        assert torch.equal(digits(given, subset=300).positions(()), digits([3, 9, 250], subset=300).positions(()))
    assert read_excluded(path, digits(subset=300).fingerprint()) == [3, 9, 250]


def test_streamed_files_are_left_out_too(tmp_path: Path, write_image: Callable[[Path, int, int], None]) -> None:
    for part, count in (("train", 6), ("test", 1)):
        for name in "ab":
            for number in range(count):
                write_image(tmp_path / part / name / f"{number}.png", 8, 8)
    held, streamed = (ImageFolderDataModule(tmp_path, 8, in_memory=kept, exclude=[0, 7]) for kept in (True, False))
    for data in (held, streamed):
        assert data.positions(()).tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert_equal(finished(held, held.clean_fit_dataloader()), finished(streamed, streamed.clean_fit_dataloader()))


@pytest.mark.parametrize(("text", "expected"), [("[3, 9]", [3, 9]), ("some/excluded.json", "some/excluded.json")])
def test_the_command_line_takes_a_list_or_a_file(text: str, expected: object) -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(DigitsDataModule, "data")
    assert str(parser.parse_args([f"--data.exclude={text}"]).data.exclude) == str(expected)
    assert parser.parse_args([]).data.exclude is None


def test_refuses_a_file_of_another_data_set(tmp_path: Path) -> None:
    path = tmp_path / "excluded.json"
    write_excluded(path, digits().fingerprint(), [1], detector="CTM", keep=0.9)
    with pytest.raises(
        MisconfigurationException, match=r"excluded\.json was made for another data set: its SHA-256 is"
    ):
        digits(path, subset=300).setup()


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Cannot read the file .*gone\.json: No such file"):
        digits(tmp_path / "gone.json").setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"excluded": [1', r"excluded\.json is not JSON"),
        (b"\xff\xfe\x00", r"excluded\.json is not JSON"),
        (b"[" * 100_000, r"excluded\.json is not JSON"),
        (b"[1, 2]", r"excluded\.json has no list of integers `excluded`"),
        (b'{"sha256": "a"}', r"excluded\.json has no list of integers `excluded`"),
        (b'{"sha256": "a", "excluded": [1.5]}', r"excluded\.json has no list of integers `excluded`"),
        (b'{"sha256": "a", "excluded": [true]}', r"excluded\.json has no list of integers `excluded`"),
        (b'{"excluded": [1]}', r"excluded\.json was made for another data set: its SHA-256 is None"),
    ],
)
def test_refuses_a_broken_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "excluded.json"
    path.write_bytes(content)
    with pytest.raises(MisconfigurationException, match=message):
        digits(path).setup()


@pytest.mark.parametrize("position", [-1, 1438])
def test_refuses_positions_outside_the_training_set(position: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`exclude` to hold positions in \[0, 1438\), but got {position}"):
        digits([3, position]).setup()
    path = tmp_path / "excluded.json"
    path.write_text(json.dumps({"sha256": digits().fingerprint(), "excluded": [3, position]}))
    with pytest.raises(MisconfigurationException, match=rf"excluded\.json names image {position}, which is not in"):
        digits(path).setup()


def test_refuses_to_leave_out_a_whole_split() -> None:
    split = digits().positions(("defend",)).tolist()
    with pytest.raises(MisconfigurationException, match=r"of split `defend` out of `exclude`: it names all 4\d\d of"):
        digits(split).setup()
    digits(split[1:]).setup()


def test_refuses_to_leave_out_a_whole_class() -> None:
    fives = (digits().train_images.labels == 5).nonzero().flatten().tolist()
    with pytest.raises(MisconfigurationException, match="of class 5 out of `exclude`: it names all of them"):
        digits(fives).setup()
    digits(fives[1:]).setup()


def test_refuses_to_write_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`excluded` to hold non-negative positions, but got -2"):
        write_excluded(tmp_path / "excluded.json", "a", [1, -2], detector="CTM", keep=0.9)
    for keep in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"`keep` to be a share in \(0, 1\], but got {keep}"):
            write_excluded(tmp_path / "excluded.json", "a", [1], detector="CTM", keep=keep)
    assert not list(tmp_path.iterdir())
