"""Manifests: nothing is lost on the way, and no file is trusted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_bd.label_maps import AllToAll, LabelMap, SourceSpecific
from lightning_bd.manifest import PoisonManifest
from lightning_bd.manifest_checks import Plain
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import (
    SIG,
    AdaptiveBlend,
    BadNets,
    Blended,
    BppAttack,
    LowFrequency,
    SequentialTrigger,
    TrainTestTrigger,
    Trigger,
    WaNet,
)

DATASET: dict[str, str | int] = {"name": "Generated", "sha256": "00", "images": 40, "classes": 10}


def described(trigger: Trigger, target: int | LabelMap = 0) -> PoisonManifest:
    poison = Poison(trigger, rate=0.25, target=target, mode="static", cover_rate=0.1, seed=7)
    poison.prepare((3, 8, 8), num_classes=10)
    return PoisonManifest.describe(poison, DATASET, {"inject": torch.tensor([1, 5])})


def test_cover_classes_travel(tmp_path: Path) -> None:
    poison = Poison(BadNets(), 0.1, SourceSpecific([1], 0), cover_rate=0.2, cover_classes=[2, 3])
    poison.prepare((3, 8, 8), num_classes=10)
    PoisonManifest.describe(poison, DATASET).save(tmp_path)
    assert PoisonManifest.load(tmp_path).cover_classes == [2, 3]


def test_a_manifest_without_cover_classes_is_read(tmp_path: Path) -> None:
    """The first ones had no such field."""
    described(BadNets()).save(tmp_path)
    values = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert values.pop("cover_classes", 0) is None
    (tmp_path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    manifest = PoisonManifest.load(tmp_path)
    assert manifest.cover_classes is None
    assert manifest.plain() == described(BadNets()).plain()
    assert "cover_classes" not in values


def damaged(name: str, value: object) -> dict[str, Plain]:
    values = described(BadNets()).plain()
    values[name] = value  # type: ignore[assignment]
    return values


@pytest.mark.parametrize(
    "trigger",
    [
        BadNets(seed=4),
        BadNets((2, 3), (1, 0), color=(0.1, 0.2, 1.0)),
        Blended(),
        AdaptiveBlend(seed=3),
        SIG(),
        WaNet(seed=2),
        LowFrequency(seed=3),
        BppAttack(2, dithering=True),
        SequentialTrigger([BppAttack(), SequentialTrigger([Blended(), BadNets((2, 3), (1, 0))])]),
        TrainTestTrigger(Blended(0.1), SequentialTrigger([Blended(0.3), SIG()])),
    ],
)
@pytest.mark.parametrize("target", [3, AllToAll(2), SourceSpecific([4, 5], 1)])
def test_round_trip(tmp_path: Path, trigger: Trigger, target: int | LabelMap) -> None:
    manifest = described(trigger, target)
    manifest.save(tmp_path)
    loaded = PoisonManifest.load(tmp_path)
    assert loaded.plain() == manifest.plain()
    assert loaded.image_shape == (3, 8, 8)
    assert loaded.tensors["indices.inject"].tolist() == [1, 5]
    assert loaded.differences(manifest) == []
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.build_trigger()(images), trigger(images))
    assert torch.equal(loaded.build_trigger().attack(images), trigger.attack(images))
    labels = torch.arange(10)
    expected = Poison(trigger, target=target).label_map(labels, 10)
    assert torch.equal(loaded.build_label_map()(labels, 10), expected)


def test_the_saved_pixels_count_and_not_a_new_draw() -> None:
    manifest = described(BadNets(seed=4))
    pixels = torch.full((3, 3, 3), 0.25)
    rebuilt = replace(manifest, tensors={"trigger.pattern_values": pixels}).build_trigger()
    assert torch.equal(rebuilt(torch.zeros(1, 3, 8, 8))[0, :, 5:, 5:], pixels)


def test_a_manifest_is_a_copy() -> None:
    trigger, chosen = BadNets(), torch.tensor([1])
    poison = Poison(trigger)
    poison.prepare((3, 8, 8), 10)
    manifest = PoisonManifest.describe(poison, DATASET, {"inject": chosen})
    trigger.pattern_values.zero_()
    chosen.zero_()
    values = manifest.plain()
    assert isinstance(values["dataset"], dict)
    values["dataset"]["name"] = "other"
    assert manifest.tensors["trigger.pattern_values"].any()
    assert manifest.tensors["indices.inject"].tolist() == [1]
    assert manifest.dataset["name"] == "Generated"


def test_phases_may_share_their_indices(tmp_path: Path) -> None:
    poison, chosen = Poison(BadNets()), torch.tensor([1, 2])
    poison.prepare((3, 8, 8), 10)
    PoisonManifest.describe(poison, DATASET, {"inject": chosen, "again": chosen}).save(tmp_path)
    assert PoisonManifest.load(tmp_path).tensors["indices.again"].tolist() == [1, 2]


def test_a_trigger_read_from_a_picture_needs_no_file() -> None:
    manifest = described(Blended())
    arguments: dict[str, Plain] = {"ratio": 0.2, "pattern": "waves", "image": "/nowhere/cat.png", "seed": 0}
    trigger = replace(manifest, trigger={"class": "Blended", "arguments": arguments}).build_trigger()
    assert isinstance(trigger, Blended)
    assert torch.equal(trigger.picture, manifest.tensors["trigger.picture"])


class Stripe(BadNets):
    """A trigger of a user."""


def test_a_users_trigger_must_be_given() -> None:
    manifest = described(Stripe())
    with pytest.raises(ValueError, match=r"trigger 'Stripe' is not one of lightning_bd.triggers .* Give a config"):
        manifest.build_trigger()
    assert type(manifest.build_trigger(known=Stripe)) is Stripe


def test_a_users_trigger_may_be_a_part() -> None:
    manifest = described(SequentialTrigger([SIG(), Stripe()]))
    with pytest.raises(ValueError, match=r"trigger 'Stripe' is not one of lightning_bd.triggers .* Give a config"):
        manifest.build_trigger(known=SequentialTrigger)
    rebuilt = manifest.build_trigger(known=(SequentialTrigger, Stripe))
    assert isinstance(rebuilt, SequentialTrigger)
    assert type(rebuilt.triggers[1]) is Stripe


def nested(depth: int) -> dict[str, Plain]:
    recipe: dict[str, Plain] = {"class": "SIG", "arguments": {}}
    for _ in range(depth):
        recipe = {"class": "SequentialTrigger", "arguments": {"triggers": [recipe]}}
    return recipe


def test_refuses_triggers_nested_without_end() -> None:
    manifest = described(SIG())
    tensors = {"trigger." + "0." * 8 + "wave": torch.zeros(8)}
    assert isinstance(replace(manifest, trigger=nested(8), tensors=tensors).build_trigger(), SequentialTrigger)
    for depth in (9, 200, 5000):
        with pytest.raises(ValueError, match="manifest's triggers are parts of parts more than 8 deep"):
            replace(manifest, trigger=nested(depth)).build_trigger()


def test_refuses_values_nested_without_end() -> None:
    """Before anything walks through them."""
    manifest = described(SIG())
    for depth in (40, 5000):
        values = manifest.plain() | {"trigger": nested(depth)}
        with pytest.raises(ValueError, match=r"manifest's `trigger` to be a class and its arguments, but got \{"):
            PoisonManifest.from_plain(values, {})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("SSBA", {"device": "nowhere"}), ("Narcissus", {"ood": "/", "surrogate": {"a": 1}}), ("SIG", {"nosuch": 1})],
)
def test_refuses_arguments_that_no_manifest_records(name: str, arguments: dict[str, Plain]) -> None:
    """Those that say how a trigger is learnt are the config's alone."""
    manifest = replace(described(SIG()), trigger={"class": name, "arguments": arguments})
    with pytest.raises(ValueError, match=rf"trigger {name} cannot be built: it records no argument '"):
        manifest.build_trigger()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"triggers": []}, "trigger SequentialTrigger cannot be built: Expected argument `triggers`"),
        ({"triggers": {"class": "SIG", "arguments": {}}}, "trigger SequentialTrigger cannot be built: Expected"),
        ({"triggers": [[{"class": "SIG", "arguments": {}}]]}, "trigger SequentialTrigger cannot be built: Expected"),
        ({"triggers": [{"class": "SIG"}]}, "trigger SequentialTrigger cannot be built: Expected"),
        ({"triggers": "SIG"}, "trigger SequentialTrigger cannot be built: Expected"),
        ({"triggers": [{"class": "os.system", "arguments": {}}]}, "trigger 'os.system' is not one of"),
        ({"triggers": [{"class": "CompositeTrigger", "arguments": {}}]}, "trigger 'CompositeTrigger' is not one of"),
        ({"triggers": [{"class": "SIG", "arguments": {"a": 1}}]}, "trigger SIG cannot be built: "),
        (
            {"triggers": [{"class": "SIG", "arguments": {}}]},
            r"trigger SequentialTrigger cannot be built: .* \['0.wave'\]",
        ),
        ({"extra": {"class": "SIG", "arguments": {}}}, "trigger SequentialTrigger cannot be built: "),
    ],
)
def test_refuses_hostile_parts(arguments: dict[str, Plain], message: str) -> None:
    manifest = replace(described(SIG()), trigger={"class": "SequentialTrigger", "arguments": arguments})
    with pytest.raises(ValueError, match=f"The manifest's {message}"):
        manifest.build_trigger()


@pytest.mark.parametrize("argument", ["size", "position", "pattern", "color", "margin"])
def test_a_trigger_without_parts_gets_none(argument: str) -> None:
    part: Plain = {"class": "SIG", "arguments": {}}
    manifest = replace(described(BadNets()), trigger={"class": "BadNets", "arguments": {argument: part}})
    with pytest.raises(ValueError, match="The manifest's trigger BadNets cannot be built: "):
        manifest.build_trigger()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "Trigger",
        "TensorSpec",
        "__import__",
        "builtins.eval",
        "base",
        "BadNets.__init__",
        "",
        "torch.nn.Linear",
    ],
)
def test_refuses_other_classes(name: str) -> None:
    manifest = described(BadNets())
    with pytest.raises(ValueError, match=r"trigger '.*' is not one of lightning_bd.triggers"):
        replace(manifest, trigger={"class": name, "arguments": {}}).build_trigger()
    with pytest.raises(ValueError, match=r"label map '.*' is not one of AllToAll, AllToOne, SourceSpecific"):
        replace(manifest, label_map={"class": name, "arguments": {}}).build_label_map()


@pytest.mark.parametrize(
    "arguments",
    [{"nonsense": 1}, {"size": "3"}, {"size": -1}, {"size": 10**30}, {"size": [1, 2, 3]}, {"color": ["a"]}],
)
def test_refuses_hostile_trigger_arguments(arguments: dict[str, Plain]) -> None:
    manifest = replace(described(BadNets()), trigger={"class": "BadNets", "arguments": arguments})
    with pytest.raises(ValueError, match="The manifest's trigger BadNets cannot be built: "):
        manifest.build_trigger()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"trigger.grid": torch.zeros(3, 3, 3)},
        {"trigger.pattern_values": torch.zeros(3, 3, 3), "trigger.more": torch.zeros(1)},
        {"trigger.pattern_values": torch.zeros(3, 4, 4)},
        {"trigger.pattern_values": torch.zeros(3, 3, 3, dtype=torch.float64)},
        {"trigger.pattern_values": torch.full((3, 3, 3), 1.5)},
        {"trigger.pattern_values": torch.full((3, 3, 3), float("nan"))},
    ],
)
def test_refuses_hostile_tensors(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="The manifest's trigger BadNets cannot be built: Expected"):
        replace(described(BadNets()), tensors=tensors).build_trigger()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AllToOne", {"target": 10}),
        ("AllToOne", {"target": "0"}),
        ("AllToOne", {}),
        ("AllToAll", {"shift": "x"}),
        ("AllToAll", {"shift": 0.5}),
        ("SourceSpecific", {"sources": 5, "target": 0}),
        ("SourceSpecific", {"sources": [11], "target": 0}),
    ],
)
def test_refuses_hostile_label_maps(name: str, arguments: dict[str, Plain]) -> None:
    manifest = replace(described(BadNets()), label_map={"class": name, "arguments": arguments})
    with pytest.raises(ValueError, match=f"The manifest's label map {name} cannot be built: "):
        manifest.build_label_map()


@pytest.mark.parametrize(
    "name",
    ["trigger", "image_shape", "label_map", "rate", "mode", "clean_label", "cover_rate", "seed", "dataset"],
)
def test_refuses_a_missing_field(tmp_path: Path, name: str) -> None:
    manifest = described(BadNets())
    manifest.save(tmp_path)
    values = manifest.plain()
    del values[name]
    (tmp_path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=f"Cannot read the poison manifest in .*: .* lacks the field '{name}'"):
        PoisonManifest.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trigger", "BadNets"),
        ("trigger", {"class": "BadNets"}),
        ("trigger", {"class": 3, "arguments": {}}),
        ("image_shape", 3),
        ("image_shape", [3, 8]),
        ("image_shape", [3, 8, -8]),
        ("image_shape", [3, 8, "8"]),
        ("label_map", None),
        ("rate", "0.1"),
        ("rate", 1.5),
        ("rate", float("nan")),
        ("mode", "all"),
        ("mode", []),
        ("clean_label", 1),
        ("cover_rate", True),
        ("seed", 0.5),
        ("dataset", []),
        ("dataset", {"classes": "10"}),
        ("dataset", {"classes": 10, "name": [1]}),
        ("cover_classes", []),
        ("cover_classes", 3),
        ("cover_classes", [-1]),
        ("cover_classes", [True]),
        ("cover_classes", ["1"]),
    ],
)
def test_refuses_a_wrong_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Expected the poison manifest's `{name}` to be .*, but got "):
        PoisonManifest.from_plain(damaged(name, value), {})


def test_refuses_what_is_no_mapping() -> None:
    values = described(BadNets()).plain()
    with pytest.raises(ValueError, match="Expected the poison manifest to be a mapping, but got a list"):
        PoisonManifest.from_plain([], {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tensors to be a mapping of names to tensors"):
        PoisonManifest.from_plain(values, {"trigger.grid": [0.5]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="tensors to be a mapping of names to tensors"):
        PoisonManifest.from_plain(values, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
def test_refuses_broken_json(tmp_path: Path, content: bytes) -> None:
    described(BadNets()).save(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"Cannot read the poison manifest in {tmp_path}"):
        PoisonManifest.load(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.safetensors"])
def test_refuses_a_missing_file(tmp_path: Path, name: str) -> None:
    described(BadNets()).save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"Cannot read the poison manifest in .*{name}"):
        PoisonManifest.load(tmp_path)


def test_refuses_broken_tensors(tmp_path: Path) -> None:
    described(BadNets()).save(tmp_path)
    (tmp_path / "manifest.safetensors").write_bytes(b"\x80\x04\x95")
    with pytest.raises(ValueError, match="Cannot read the poison manifest in "):
        PoisonManifest.load(tmp_path)


def test_a_pickle_in_place_of_tensors_is_not_run(tmp_path: Path) -> None:
    described(BadNets()).save(tmp_path)
    torch.save({"trigger.pattern_values": torch.zeros(3, 3, 3)}, tmp_path / "manifest.safetensors")
    with pytest.raises(ValueError, match="Cannot read the poison manifest in "):
        PoisonManifest.load(tmp_path)


def test_the_file_on_disk_is_plain(tmp_path: Path) -> None:
    manifest = described(BadNets())
    manifest.save(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert written["rate"] == 0.25
    assert written["trigger"]["class"] == "BadNets"
    save_file({"trigger.pattern_values": torch.zeros(3, 3, 3)}, tmp_path / "manifest.safetensors")
    assert manifest.differences(PoisonManifest.load(tmp_path)) == ["trigger.pattern_values: the pixels differ"]


def test_differences_name_the_field() -> None:
    manifest = described(BadNets())
    assert manifest.differences(replace(manifest, rate=0.5, seed=1, cover_rate=0.0)) == []
    assert manifest.differences(described(BadNets(seed=1))) == ["trigger.arguments.seed: was 0, is 1"]
    assert manifest.differences(described(BadNets(), target=1))[0].startswith("label_map.arguments.target: ")
    assert manifest.differences(replace(manifest, mode="dynamic")) == ["mode: was 'static', is 'dynamic'"]
    assert manifest.differences(replace(manifest, image_shape=(1, 8, 8)))[0].startswith("image_shape.0: ")
    found = manifest.differences(replace(manifest, tensors={}))
    assert found == ["trigger.pattern_values: the pixels differ"]
