"""The trigger of an evaluation is the checkpoint's; predictions become a table."""

import copy
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bd.batch import RawBatch, Sample
from lightning_bd.checkpointing import RECORD_KEY, read_checkpoint, save_atomically
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.evaluation import use_manifest_of, write_predictions
from lightning_bd.label_maps import AllToAll, SourceSpecific
from lightning_bd.phase_callbacks import RunRecord
from lightning_bd.poisoning import Poison
from lightning_bd.selection import KNNTypicality, RawPixels
from lightning_bd.triggers import SIG, BadNets, SequentialTrigger, TrainTestTrigger

PATH = Path("model.ckpt")


def poison(seed: int = 7, target: int = 3, mode: str = "dynamic") -> Poison:
    return Poison(
        BadNets(size=2, seed=seed), rate=0.25, target=target, mode="static" if mode == "static" else "dynamic"
    )


def make_checkpoint(folder: Path, rule: Poison | None) -> dict[str, Any]:
    """A checkpoint as a run writes it, from the disk."""
    data = DigitsDataModule(rule)
    record = RunRecord("inject", data.manifest(), config=None).content()
    save_atomically({"state_dict": {}, RECORD_KEY: record}, folder / "model.ckpt")
    return read_checkpoint(folder / "model.ckpt")


def triggered(data: DigitsDataModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of the attack test set."""
    loader = data.test_dataloader()[1]
    batches = [data.on_after_batch_transfer(raw, 1) for raw in loader if isinstance(raw, RawBatch)]
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("configured", [False, True])
def test_the_checkpoints_trigger_is_taken_over(tmp_path: Path, mode: str, configured: bool) -> None:
    trained = DigitsDataModule(poison(mode=mode))
    data = DigitsDataModule(poison(mode=mode) if configured else None)
    use_manifest_of(make_checkpoint(tmp_path, poison(mode=mode)), PATH, data)
    assert data.poison is not None
    assert (data.poison.rate, data.poison.mode) == (0.25, mode)
    for found, expected in zip(triggered(data), triggered(trained), strict=True):
        assert torch.equal(found, expected)


def test_the_pixels_come_from_the_checkpoint_and_not_from_the_seed(tmp_path: Path) -> None:
    """The trigger of a model outlives a change of how triggers are drawn."""
    checkpoint = make_checkpoint(tmp_path, poison())
    checkpoint[RECORD_KEY]["tensors"]["trigger.pattern_values"].fill_(0.125)
    data = DigitsDataModule()
    use_manifest_of(checkpoint, PATH, data)
    images, _ = triggered(data)
    assert (images[:, :, -2:, -2:] == 0.125).all()


class Corner(BadNets):
    """A trigger of a user."""


def test_triggers_made_of_others_are_taken_over(tmp_path: Path) -> None:
    """The attack set shows the test trigger, whoever wrote its parts."""

    def rule() -> Poison:
        return Poison(TrainTestTrigger(SIG(0.1), SequentialTrigger([SIG(0.4), Corner(size=2)])), rate=0.25)

    data = DigitsDataModule(rule())
    use_manifest_of(make_checkpoint(tmp_path, rule()), PATH, data)
    images, _ = triggered(data)
    clean = data.test_images.read((data.test_images.labels != 0).nonzero().flatten()) / 255
    assert torch.equal(images, Corner(size=2)(SIG(0.4)(clean)))


def test_cover_classes_are_taken_over(tmp_path: Path) -> None:
    rule = Poison(BadNets(size=2), target=SourceSpecific([1], 0), cover_rate=0.1, cover_classes=[2, 3])
    data = DigitsDataModule()
    use_manifest_of(make_checkpoint(tmp_path, rule), PATH, data)
    assert data.poison is not None
    assert (data.poison.cover_rate, data.poison.cover_classes) == (0.1, [2, 3])


def test_label_maps_are_taken_over(tmp_path: Path) -> None:
    rule = Poison(BadNets(size=2), rate=1.0, target=AllToAll())
    data = DigitsDataModule()
    use_manifest_of(make_checkpoint(tmp_path, rule), PATH, data)
    for found, expected in zip(triggered(data), triggered(DigitsDataModule(rule)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (poison(seed=8), "trigger.arguments.seed: was 7, is 8"),
        (poison(target=4), "label_map.arguments.target: was 3, is 4"),
        (poison(mode="static"), "mode: was 'dynamic', is 'static'"),
        (Poison(BadNets(size=3, seed=7), rate=0.25, target=3, mode="dynamic"), "trigger.arguments.size: was 2, is 3"),
    ],
)
def test_another_trigger_in_the_config_is_refused(tmp_path: Path, other: Poison, what: str) -> None:
    checkpoint = make_checkpoint(tmp_path, poison())
    data = DigitsDataModule(copy.deepcopy(other))
    before = data.poison
    with pytest.raises(
        MisconfigurationException,
        match=rf"The trigger of model\.ckpt is not the config's:\n  {what}(?s:.*)\(checkpoint against config\)\. ",
    ):
        use_manifest_of(checkpoint, PATH, data)
    assert data.poison is before


def test_override_keeps_the_configs(tmp_path: Path) -> None:
    data, twin = DigitsDataModule(poison(seed=8, target=4)), DigitsDataModule(poison(seed=8, target=4))
    use_manifest_of(make_checkpoint(tmp_path, poison()), PATH, data, override=True)
    for found, expected in zip(triggered(data), triggered(twin), strict=True):
        assert torch.equal(found, expected)


def test_another_rate_is_no_other_trigger(tmp_path: Path) -> None:
    data = DigitsDataModule(Poison(BadNets(size=2, seed=7), rate=0.9, target=3, mode="dynamic"))
    use_manifest_of(make_checkpoint(tmp_path, poison()), PATH, data)
    assert data.poison is not None
    assert data.poison.rate == 0.25


@pytest.mark.parametrize("checkpoint", [{"state_dict": {}}, {"state_dict": {}, RECORD_KEY: None}, None])
def test_a_checkpoint_without_a_manifest_changes_nothing(tmp_path: Path, checkpoint: dict[str, Any] | None) -> None:
    configured, clean = DigitsDataModule(poison()), DigitsDataModule()
    before = configured.poison
    for data in (configured, clean):
        use_manifest_of(checkpoint if checkpoint is not None else make_checkpoint(tmp_path, None), PATH, data)
    assert configured.poison is before
    assert clean.poison is None


@pytest.mark.parametrize("record", [
    {"manifest": {"trigger": 3}}, {"manifest": 3, "tensors": {}}, {"manifest": {"rate": 1}, "tensors": None}, "record",
])  # fmt: skip
def test_a_broken_record_is_an_error_with_a_name(record: object) -> None:
    with pytest.raises(ValueError, match="poison manifest"):
        use_manifest_of({"state_dict": {}, RECORD_KEY: record}, PATH, DigitsDataModule())


def test_a_manifest_for_other_images_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, poison())
    checkpoint[RECORD_KEY]["manifest"]["image_shape"] = [1, 16, 16]
    with pytest.raises(ValueError, match="16"):
        use_manifest_of(checkpoint, PATH, DigitsDataModule())


def test_predictions_are_written_one_row_per_image(tmp_path: Path) -> None:
    first = (torch.tensor([[0.1, 0.9], [0.75, 0.25]]), torch.tensor([1, 1]))
    last = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    write_predictions([first, last], tmp_path / "deep" / "predictions.csv")
    with (tmp_path / "deep" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["index", "label", "prediction", "confidence"],
        ["0", "1", "1", "0.900000"],
        ["1", "1", "0", "0.750000"],
        ["2", "0", "0", "1.000000"],
    ]


def test_a_shape_of_any_size_in_a_hostile_file_allocates_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, poison())
    record = checkpoint[RECORD_KEY]
    record["manifest"]["image_shape"] = [3, 2**24, 2**24]
    record["tensors"] = {"trigger.pattern_values": torch.zeros(1).expand(3, 2**24, 2**24)}
    with pytest.raises(ValueError, match=r"shape \(3, 16777216, 16777216\), but DigitsDataModule has \(1, 8, 8\)"):
        use_manifest_of(checkpoint, PATH, DigitsDataModule())


def test_predictions_keep_the_indices_of_samples(tmp_path: Path) -> None:
    batch = (torch.tensor([[0.1, 0.9], [0.75, 0.25]]), torch.tensor([1, 1]), torch.tensor([4, 2]))
    write_predictions([batch], tmp_path / "predictions.csv")
    lines = (tmp_path / "predictions.csv").read_text(encoding="utf-8").split()
    assert lines[1:] == ["4,1,1,0.900000", "2,1,0,0.750000"]


def test_the_configs_selection_is_kept(tmp_path: Path) -> None:
    """Or training images that are scored for a poison would have it on others than the model was trained with."""
    phase = PhaseData("inject", poison="static")

    def rule() -> Poison:
        return replace(poison(mode="static"), selection=KNNTypicality(RawPixels(), k=3), clean_label=True)

    trained, data = DigitsDataModule(rule()), DigitsDataModule(rule())
    use_manifest_of(make_checkpoint(tmp_path, rule()), PATH, data)
    expected, found = (each.manifest((phase,)) for each in (trained, data))
    assert expected is not None
    assert found is not None
    assert expected.tensors["indices.inject"].tolist() == found.tensors["indices.inject"].tolist()
    plain = DigitsDataModule(replace(rule(), selection=None)).manifest((phase,))
    assert plain is not None
    assert plain.tensors["indices.inject"].tolist() != expected.tensors["indices.inject"].tolist()


PHASE = PhaseData("inject", ("a",), poison="static")
SPLITS = {"a": 0.8, "b": 0.2}


def hard(**changes: Any) -> Poison:
    """Which images are poisoned is a matter of a scorer, that no manifest has."""
    rule = replace(poison(mode="static"), selection=KNNTypicality(RawPixels(), k=3), clean_label=True)
    return replace(rule, **changes)


def plan(rule: Poison) -> DigitsDataModule:
    return DigitsDataModule(rule, SPLITS, subset=300)


def record_of(data: DigitsDataModule) -> tuple[dict[str, Any], torch.Tensor]:
    """What a checkpoint says of a phase, and which images that phase poisoned."""
    manifest = data.manifest((PHASE,))
    assert manifest is not None
    return {RECORD_KEY: {"manifest": manifest.plain(), "tensors": manifest.tensors}}, manifest.tensors["indices.inject"]


def stored(data: DigitsDataModule) -> tuple[list[int], list[int]]:
    """Positions of the poisoned images as they lie in the data set, and of the covers."""
    loader = data.stored_dataloader(PHASE)
    batches = [data.on_after_batch_transfer(raw, 0) for raw in loader if isinstance(raw, RawBatch)]
    samples = [batch for batch in batches if isinstance(batch, Sample)]
    flags, index = torch.cat([each.is_poisoned for each in samples]), torch.cat([each.index for each in samples])
    assert loader.static_rows is not None
    assert torch.equal(loader.static_rows[index], flags)
    assert loader.static_covers is not None
    return sorted(index[flags].tolist()), loader.static_covers.nonzero().flatten().tolist()


@pytest.mark.parametrize("cover_rate", [0.0, 0.1])
@pytest.mark.parametrize("exclude", [None, list(range(0, 300, 7))])
def test_a_models_own_training_images_are_the_poisoned_ones(cover_rate: float, exclude: list[int] | None) -> None:
    trained = DigitsDataModule(hard(cover_rate=cover_rate), SPLITS, subset=300, exclude=exclude)
    checkpoint, chosen = record_of(trained)
    expected = stored(trained)
    assert expected[0] == chosen.tolist()
    for rule in (hard(cover_rate=cover_rate), None, hard(selection=None), hard(selection=None, rate=0.9)):
        data = DigitsDataModule(rule, SPLITS, subset=300, exclude=exclude)
        use_manifest_of(checkpoint, PATH, data)
        found = stored(data)
        assert found[0] == expected[0]
        assert len(found[1]) == len(expected[1])
        assert not set(found[0]) & set(found[1])
        # Covers beside poisoned images that were left out can only be told by the scorer.
        if exclude is None or (rule is not None and rule.selection is not None):
            assert found == expected


def test_another_poison_has_no_record() -> None:
    checkpoint, chosen = record_of(plan(hard()))
    data = plan(hard())
    use_manifest_of(checkpoint, PATH, data)
    data.replace_poison(hard(selection=None))
    assert stored(data) == stored(plan(hard(selection=None)))
    assert stored(data)[0] != chosen.tolist()


def test_covers_of_a_random_choice_are_those_of_the_training_set() -> None:
    rule = poison(mode="static")
    trained, data = plan(replace(rule, cover_rate=0.2)), DigitsDataModule(None, SPLITS, subset=300)
    use_manifest_of(record_of(trained)[0], PATH, data)
    assert stored(data) == stored(trained)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (torch.tensor([1.0, 2.0]), r"`indices\.inject` to be at most 300 int64 positions, but got torch\.float32"),
        (torch.tensor([[1, 2]]), r"at most 300 int64 positions, but got torch\.int64 of shape \(1, 2\)"),
        (torch.zeros(1, dtype=torch.int64).expand(200), "at most 300 int64 positions"),
        (torch.arange(301), "at most 300 int64 positions"),
        (torch.tensor([2, 1]), r"to increase, in \[0, 300\)"),
        (torch.tensor([1, 1]), r"to increase, in \[0, 300\)"),
        (torch.tensor([-1, 1]), r"to increase, in \[0, 300\)"),
        (torch.tensor([1, 300]), r"to increase, in \[0, 300\)"),
    ],
)
def test_broken_positions_are_refused(indices: torch.Tensor, words: str) -> None:
    checkpoint, _ = record_of(plan(hard()))
    checkpoint[RECORD_KEY]["tensors"]["indices.inject"] = indices
    data = plan(hard())
    use_manifest_of(checkpoint, PATH, data)
    with pytest.raises(ValueError, match=words):
        data.stored_dataloader(PHASE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subset": 299}, r"known for other data than DigitsDataModule's .* `data\.subset`"),
        ({"splits": {"b": 0.5, "a": 0.5}}, r"to be in split `a`, but some are not\. Use the `data\.splits`"),
        ({"exclude": [0]}, r"trained without 2 of the images .* excludes 1\. Give the `data\.exclude`"),
    ],
)
def test_poisoned_images_of_other_data_are_refused(changes: dict[str, Any], words: str) -> None:
    exclude = [0, 1] if "exclude" in changes else None
    checkpoint, _ = record_of(DigitsDataModule(hard(), SPLITS, subset=300, exclude=exclude))
    data = DigitsDataModule(None, **{"splits": SPLITS, "subset": 300, **changes})
    use_manifest_of(checkpoint, PATH, data)
    with pytest.raises(ValueError, match=words):
        data.stored_dataloader(PHASE)
