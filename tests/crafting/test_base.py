"""What any crafting goes through: rule, loaders, manifest, and a checkpoint that outlives its folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

from lightning_bd.backbones import small_cnn
from lightning_bd.batch import PoisonMode, Sample
from lightning_bd.checkpointing import RECORD_KEY
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.commands.preview import draw_preview
from lightning_bd.crafting import AbsentCrafting, Crafting, LabelConsistent, PrecomputedPoison
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule, ImageFolderDataModule, PhaseData
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.evaluation import use_manifest_of
from lightning_bd.manifest import PoisonManifest
from lightning_bd.manifest_checks import Plain
from lightning_bd.phase import Phase
from lightning_bd.phase_measurement import success_interval
from lightning_bd.phase_run import PhaseRun
from lightning_bd.poisoning import Poison
from lightning_bd.run_folder import PhaseResult
from lightning_bd.selection import Surrogate
from lightning_bd.triggers import BadNets

Finish = Callable[[ImageDataModule, BatchLoader], Sample]
Save = Callable[[Path, Tensor], None]

PATH = Path("run/00_inject/final.ckpt")


class Darker(Crafting):
    """Halves the images and counts how often."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.calls: list[tuple[Tensor, Tensor]] = []

    def craft(self, chosen: Tensor, positions: Tensor, labels: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        self.calls.append((chosen, positions))
        made = read(chosen) // 2
        return {"": made, "dtype": made.float(), "count": made[1:]}[self.wrong]


def rule(crafting: Crafting | None, **arguments: Any) -> Poison:
    return Poison(BadNets(2, pattern="white"), **{"rate": 0.2, "mode": "static", "crafting": crafting, **arguments})


def digits(crafting: Crafting | None, **arguments: Any) -> DigitsDataModule:
    return DigitsDataModule(rule(crafting), **{"subset": 200, "splits": {"a": 0.5, "b": 0.5}, "seed": 0, **arguments})


def test_refused_rules() -> None:
    with pytest.raises(ValueError, match=r"`mode` to be 'static' with `crafting`, .* but got 'dynamic'"):
        Poison(BadNets(), crafting=Darker())
    data = digits(Darker())
    with pytest.raises(MisconfigurationException, match=r"Phase `fit` is poisoned anew .* `poisoned: static`"):
        data.set_phase(PhaseData("fit", ("a",), "dynamic"))


@pytest.mark.parametrize(("wrong", "got"), [("dtype", r"torch.float32"), ("count", r"\(19, 1, 8, 8\) torch.uint8")])
def test_refuses_what_is_no_image(wrong: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"`Darker` to give \(20, 1, 8, 8\) uint8 images, but got .*{got}"):
        digits(Darker(wrong), splits={"a": 0.5, "b": 0.5}).stored_dataloader(PhaseData("fit", ("a",), "static"))


def test_crafted_once_per_union_of_splits_and_not_to_evaluate() -> None:
    crafting = Darker()
    data = digits(crafting)
    data.setup()
    phases = [PhaseData("one", ("a",), "static"), PhaseData("two", ("a", "b"), "static")]
    data.test_dataloader()
    data.clean_fit_dataloader()
    data.manifest(tuple(phases))
    data.set_phase(phases[0])
    assert crafting.calls == []
    for phase in (phases[0], phases[1], PhaseData("again", ("b", "a"), "static"), phases[0]):
        data.set_phase(phase)
        data.train_dataloader()
        data.stored_dataloader(phase)
    assert len(crafting.calls) == 2
    chosen, positions = crafting.calls[0]
    manifest = data.manifest(tuple(phases))
    assert manifest is not None
    assert torch.equal(chosen, manifest.tensors["indices.one"])
    assert torch.equal(positions, data.positions(("a",)))
    data.replace_poison(data.poison)
    data.train_dataloader()
    assert len(crafting.calls) == 3


def test_the_defender_finds_what_the_attacker_left(finished: Finish) -> None:
    """Images that are excluded later change none of the others."""
    crafting = Darker()
    phase = PhaseData("fit", ("a",), "static")
    sample = finished(data := digits(crafting), data.stored_dataloader(phase))
    dropped = sample.index[:30].tolist()
    other = Darker()
    fewer = finished(data := digits(other, exclude=dropped), data.stored_dataloader(phase))
    for before, after in zip(crafting.calls[0], other.calls[0], strict=True):
        assert torch.equal(before, after)
    assert int(sample.is_poisoned[:30].sum()) > 0
    for before, after in zip(sample, fewer, strict=True):
        assert torch.equal(before[30:], after)


def test_replay_is_what_the_phase_saw(finished: Finish) -> None:
    data = digits(Darker(), augment="crop")
    first = PhaseData("inject", ("a",), "static")
    data.set_phase(PhaseData("next", ("b",)), first)
    replayed = [batch for batch in data.reference_batches() if isinstance(batch, Sample)]
    clean = [batch for batch in data.reference_batches(clean=True) if isinstance(batch, Sample)]
    assert sum(int(batch.is_poisoned.sum()) for batch in replayed) == 20
    for batch, other in zip(replayed, clean, strict=True):
        hit = batch.is_poisoned
        assert torch.equal(batch.image[~hit], other.image[~hit])
        assert (batch.image[hit] != other.image[hit]).flatten(1).any(1).all()


@pytest.mark.parametrize(("in_memory", "num_workers"), [(True, 0), (False, 0), (False, 2)])
def test_streamed_images_are_replaced_too(tmp_path: Path, finished: Finish, in_memory: bool, num_workers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for label in range(2):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for number in range(6):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / str(label) / f"{number}.png")
    poison = rule(Darker(), rate=0.5)
    data = ImageFolderDataModule(
        tmp_path, 8, poison=poison, in_memory=in_memory, num_workers=num_workers, augment="none", seed=0
    )
    sample = finished(data, data.train_dataloader())
    expected = data.train_images.read(sample.index)
    expected[sample.is_poisoned] //= 2
    expected[sample.is_poisoned, :, -2:, -2:] = 255
    assert int(sample.is_poisoned.sum()) == 6
    assert torch.equal((sample.image * 255).round().to(torch.uint8), expected)


def described(crafting: Crafting | None, **arguments: Any) -> PoisonManifest:
    manifest = DigitsDataModule(rule(crafting, **arguments)).manifest()
    assert manifest is not None
    return manifest


def test_the_manifest_names_the_crafting_without_paths(tmp_path: Path, save_png: Save) -> None:
    save_png(tmp_path / "3.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    plain = described(LabelConsistent(steps=7), clean_label=True)
    assert plain.crafting is not None
    assert plain.crafting["class"] == "LabelConsistent"
    assert plain.crafting["attack_images"] is None
    arguments = plain.crafting["arguments"]
    assert isinstance(arguments, dict)
    assert (arguments["steps"], arguments["robust_steps"]) == (7, 7)
    made = described(PrecomputedPoison("folder", tmp_path))
    assert made.crafting is not None
    assert str(tmp_path) not in str(made.plain())
    assert len(str(made.crafting["attack_images"])) == 64
    for manifest in (plain, made, described(None)):
        manifest.save(tmp_path)
        assert PoisonManifest.load(tmp_path).crafting == manifest.crafting
    # How training images were made does not change how the attack is measured.
    assert plain.differences(described(None, clean_label=True)) == []
    [difference] = made.differences(described(None))
    assert difference.startswith("crafting.attack_images: was ")
    (tmp_path / "3.png").rename(tmp_path / "4.png")
    assert len(made.differences(described(PrecomputedPoison("folder", tmp_path)))) == 1


@pytest.mark.parametrize("value", ["x", {"class": "A"}, {"class": "A", "arguments": {}, "attack_images": 3}])
def test_a_broken_manifest_is_refused(value: Plain) -> None:
    values = described(None).plain() | {"crafting": value}
    with pytest.raises(ValueError, match="manifest's `crafting` to be a class, its arguments and a digest, or nothing"):
        PoisonManifest.from_plain(values, {})


def test_manifests_from_before_there_was_crafting() -> None:
    manifest = described(None)
    values = manifest.plain()
    del values["crafting"]
    assert PoisonManifest.from_plain(values, manifest.tensors).crafting is None


def checkpoint(manifest: PoisonManifest) -> dict[str, Any]:
    return {RECORD_KEY: {"manifest": manifest.plain(), "tensors": manifest.tensors}}


def test_a_checkpoint_is_measured_without_its_folder(finished: Finish) -> None:
    saved = checkpoint(described(PrecomputedPoison("nowhere")))
    data = DigitsDataModule()
    use_manifest_of(saved, PATH, data)
    assert data.poison is not None
    assert isinstance(data.poison.crafting, AbsentCrafting)
    assert (finished(data, data.test_dataloader()[1]).image[..., -2:, -2:] == 1).all()
    # What is saved with a defended model says the same.
    manifest = data.manifest()
    assert manifest is not None
    assert manifest.crafting == {"class": "PrecomputedPoison", "arguments": {}, "attack_images": None}
    with pytest.raises(ValueError, match=r"crafted by PrecomputedPoison, which a checkpoint does not hold. Give `data"):
        data.set_phase(PhaseData("fit", poison="static"))
    with pytest.raises(ValueError, match="crafted by PrecomputedPoison"):
        data.poison.crafting.craft(torch.arange(1), torch.arange(1), torch.zeros(1), data.train_images.read)


def test_the_configs_crafting_stays() -> None:
    saved = checkpoint(described(Darker()))
    crafting = Darker()
    data = DigitsDataModule(rule(crafting))
    use_manifest_of(saved, PATH, data)
    assert data.poison is not None
    assert data.poison.crafting is crafting
    data = DigitsDataModule(rule(crafting))
    use_manifest_of(checkpoint(described(None)), PATH, data)
    assert data.poison is not None
    assert data.poison.crafting is None


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (LabelConsistent(epsilon=0.01), r"crafting\.arguments\.epsilon: was 0\.0627\d+, is 0\.01\n"),
        (LabelConsistent(Surrogate(epochs=2)), r"crafting\.arguments\.surrogate\.epochs: was 30, is 2\n"),
        (Darker(), r"crafting\.class: was 'LabelConsistent', is 'Darker'"),
    ],
)
def test_another_crafting_in_the_config_is_refused(other: Crafting, what: str) -> None:
    saved = checkpoint(described(LabelConsistent(), clean_label=True))
    data = DigitsDataModule(rule(other, clean_label=True))
    with pytest.raises(MisconfigurationException, match=rf"not the config's:\n  {what}(?s:.*)`--override-trigger`"):
        use_manifest_of(saved, PATH, data)
    use_manifest_of(saved, PATH, data, override=True)
    assert data.poison is not None
    assert data.poison.crafting is other
    same = LabelConsistent(cache_dir="elsewhere")
    data = DigitsDataModule(rule(same, clean_label=True))
    use_manifest_of(saved, PATH, data)
    assert data.poison is not None
    assert data.poison.crafting is same


def test_images_that_are_gone_cannot_be_scored(tmp_path: Path, save_png: Save) -> None:
    phase = PhaseData("fit", ("a",), "static")
    data = digits(None)
    for index in data.positions(("a",)).tolist():
        save_png(tmp_path / f"{index}.png", data.train_images.read(torch.tensor([index]))[0])
    manifest = digits(PrecomputedPoison(tmp_path)).manifest((phase,))
    assert manifest is not None
    chosen = manifest.tensors["indices.fit"]
    data = digits(PrecomputedPoison(tmp_path))
    use_manifest_of(checkpoint(manifest), PATH, data)
    assert data.stored_dataloader(phase).static_rows is not None
    (tmp_path / f"{int(chosen[0])}.png").unlink()
    data = digits(PrecomputedPoison(tmp_path))
    use_manifest_of(checkpoint(manifest), PATH, data)
    with pytest.raises(ValueError, match=rf"all {len(chosen)} images .* cannot be made \(.* holds 99 images\)"):
        data.stored_dataloader(phase)


def test_test_images_made_elsewhere_must_be_there(tmp_path: Path, save_png: Save, finished: Finish) -> None:
    for index in range(4):
        save_png(tmp_path / f"{index}.png", torch.full((1, 8, 8), 9, dtype=torch.uint8))
    saved = checkpoint(described(PrecomputedPoison("nowhere", tmp_path)))
    with pytest.raises(MisconfigurationException, match=r"test images that another program made, .* `test_folder`"):
        use_manifest_of(saved, PATH, DigitsDataModule())
    with pytest.raises(MisconfigurationException, match=r"crafting.attack_images: was '.*', is None"):
        use_manifest_of(saved, PATH, DigitsDataModule(rule(PrecomputedPoison("nowhere"))))
    data = DigitsDataModule(rule(PrecomputedPoison("elsewhere", tmp_path)))
    use_manifest_of(saved, PATH, data)
    sample = finished(data, data.test_dataloader()[1])
    assert ((sample.image * 255).round() == 9).all()
    assert 1 <= len(sample.image) <= 4
    # Intervals are of the images that were attacked.
    low, high = success_interval(1.0, data, whole=True)
    assert low is not None
    assert high == 1.0
    assert low < 0.6


def test_preview_shows_the_images_made_elsewhere(tmp_path: Path, save_png: Save) -> None:
    data = DigitsDataModule()
    for index in range(10):
        image = data.test_images.read(torch.tensor([index]))[0]
        image[..., 0, 0] ^= 128
        save_png(tmp_path / f"{index}.png", image)
    attacked = DigitsDataModule(rule(PrecomputedPoison("nowhere", tmp_path)))
    _, measured = draw_preview(attacked, tmp_path / "preview.png", 2, 100)
    assert measured.unchanged == 0
    assert measured.largest_change == pytest.approx(128 / 255)


@pytest.mark.parametrize("mode", ["static"])
def test_final_images_do_not_need_a_trigger_that_fits_twice(mode: PoisonMode, finished: Finish) -> None:
    """The trigger is on top of crafted images, once."""
    crafting = Darker()
    data = digits(crafting, splits={"a": 1.0})
    phase = PhaseData("fit", ("a",), mode)
    sample = finished(data, data.stored_dataloader(phase))
    crafted = data.train_images.read(sample.index) // 2
    crafted[..., -2:, -2:] = 255
    hit = sample.is_poisoned
    assert torch.equal((sample.image[hit] * 255).round().to(torch.uint8), crafted[hit])
    assert (sample.label[hit] == 0).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_of_several_processes_crafts_for_all(tmp_path: Path, processes: int) -> None:
    """Before the others go on, which then find the images on disk."""
    crafting = Darker()
    data = digits(crafting)
    phases = {"one": Phase("one", split="a", poisoned=True), "two": Phase("two", split="b")}
    parents = {"one": "init", "two": "one"}
    model = BackdoorClassifier(small_cnn(10, 1, width=4), 10)

    def made() -> PhaseRun:
        return PhaseRun(
            phases, parents, model, data, arguments={"default_root_dir": tmp_path, "max_epochs": 1},
            processes=processes, barrier=lambda: called.append(len(crafting.calls)),
        )  # fmt: skip

    called: list[int] = []
    made()
    assert called == [processes - 1]
    # A phase that is finished needs no images.
    data.replace_poison(data.poison)
    run = made()
    count = len(crafting.calls)
    run.folder.phase("one").path.mkdir(parents=True, exist_ok=True)
    run.folder.phase("one").finish(PhaseResult("one", "init", 0.5, None, None, 1, 0.0, 1, ""))
    data.replace_poison(data.poison)
    made()
    assert len(crafting.calls) == count
