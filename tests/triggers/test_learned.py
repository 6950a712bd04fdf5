"""Triggers that are learnt: when, from which images, kept where, and never twice."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_bd.backbones import small_cnn
from lightning_bd.checkpointing import RECORD_KEY, read_checkpoint, save_atomically
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.commands import CommandTrainer
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule, ImageFolderDataModule, PhaseData
from lightning_bd.evaluation import use_manifest_of
from lightning_bd.manifest import PoisonManifest
from lightning_bd.phase import Phase
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import SIG, SSBA, SequentialTrigger, TensorSpec, TrainTestTrigger, Trigger
from lightning_bd.triggers.learned import LearnedTrigger, unlearned

IMAGES = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(12) % 3
PATH = Path("some.ckpt")


class Mean(LearnedTrigger):
    """Blends in the mean of the images, with noise of the global stream."""

    only_for_learning: ClassVar[tuple[str, ...]] = ("noise",)
    #: Labels that each call of ``_learn`` saw.
    calls: ClassVar[list[Tensor]] = []
    mean: Tensor

    def __init__(self, ratio: float = 0.5, noise: float = 0.1) -> None:
        super().__init__()
        self.ratio = ratio
        self.noise = noise

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        if image_shape[0] == 2:
            raise ValueError("two channels do not fit")
        return {"mean": TensorSpec(image_shape, 0.0, 1.0)}

    def _learn(self, images: Tensor, labels: Tensor, target: int | None) -> dict[str, Tensor]:
        Mean.calls.append(labels)
        weights = torch.arange(1, len(images) + 1).view(-1, 1, 1, 1)
        mean = (images.float() * weights).sum(dim=0) / weights.sum() / 255
        assert torch.is_grad_enabled()
        return {"mean": (1 - self.noise) * mean + self.noise * torch.rand(mean.shape)}

    def _transform(self, images: Tensor) -> Tensor:
        return torch.lerp(images, self.mean.to(images), self.ratio)


class MeanOfAll(Mean):
    needs_other_classes: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "cache"))
    Mean.calls.clear()
    return tmp_path / "cache" / "triggers"


def learned(trigger: Trigger | None = None, images: Tensor = IMAGES, labels: Tensor = LABELS) -> Mean:
    trigger = trigger if trigger is not None else Mean()
    assert isinstance(trigger, Mean)
    trigger.learn(images, labels, 0)
    return trigger


def test_the_same_images_give_the_same_trigger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = learned()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "other"))
    with torch.inference_mode():
        second = learned(images=IMAGES.float() / 255)
    assert len(Mean.calls) == 2
    assert torch.equal(first.mean, second.mean)
    assert not second.mean.is_inference()
    assert not second.mean.requires_grad


def test_a_learnt_trigger_is_not_learnt_again() -> None:
    trigger = learned()
    learned(trigger, images=IMAGES[:5], labels=LABELS[:5])
    assert len(Mean.calls) == 1
    twin = Mean()
    twin.restore((1, 4, 4), trigger.state_dict())
    learned(twin)
    assert len(Mean.calls) == 1


def test_what_was_kept_is_read(cache: Path) -> None:
    first = learned()
    [file] = cache.iterdir()
    assert file.name.startswith("Mean-")
    assert file.suffix == ".safetensors"
    second = learned()
    assert len(Mean.calls) == 1
    assert torch.equal(first.mean, second.mean)
    assert second.image_shape == (1, 4, 4)


def test_the_order_of_the_images_does_not_matter(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = learned()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    second = learned(images=IMAGES[order], labels=LABELS[order])
    assert len(Mean.calls) == len(list(cache.iterdir())) == 1
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "other"))
    third = learned(images=IMAGES[order], labels=LABELS[order])
    assert len(Mean.calls) == 2
    assert torch.equal(*Mean.calls)
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.mean, third.mean)


def test_whatever_matters_is_in_the_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = IMAGES.clone()
    changed[7, 0, 2, 1] ^= 1
    swapped = LABELS.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    learned()
    learned(images=changed)
    learned(labels=swapped)
    learned(images=IMAGES[1:], labels=LABELS[1:])
    learned(images=IMAGES.view(12, 1, 2, 8))
    learned(Mean(noise=0.2))
    learned(Mean(ratio=0.2))
    learned(MeanOfAll())
    Mean().learn(IMAGES, LABELS, 1)
    Mean().learn(IMAGES, LABELS, None)
    monkeypatch.setattr(Mean, "version", 2)
    learned()
    monkeypatch.setattr("lightning_bd.triggers.learned._VERSION", 2)
    learned()
    assert len(Mean.calls) == len(list(cache.iterdir())) == 12


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", {"mean": torch.zeros(1, 4, 5)}, {"mean": torch.full((1, 4, 4), torch.nan)}, {}]
)
def test_a_broken_file_is_made_anew(cache: Path, content: bytes | dict[str, Tensor]) -> None:
    expected = learned().mean
    [file] = cache.iterdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    with pytest.warns(UserWarning, match=r"The trigger in .*Mean-.* is broken and made anew"):
        assert torch.equal(learned().mean, expected)
    assert len(Mean.calls) == 2
    assert torch.equal(load_file(file)["mean"], expected)


def test_a_folder_that_cannot_be_written(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    with pytest.warns(UserWarning, match=r"could not be kept for the next run: .* LIGHTNING_BD_CACHE"):
        assert learned().image_shape == (1, 4, 4)


def test_a_full_disk_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match="trigger could not be kept for the next run: .*No space left"):
        assert learned().image_shape == (1, 4, 4)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("trigger", [Mean(), SequentialTrigger([SIG(), Mean()]), SSBA(bits=2, width=1)])
def test_must_be_learnt_before_it_is_used(trigger: Trigger) -> None:
    for use in (lambda: trigger.build((1, 8, 8)), lambda: trigger(torch.zeros(1, 1, 8, 8))):
        with pytest.raises(RuntimeError, match=r"is learnt from images: call `learn\(images, labels, target\)`"):
            use()
    assert trigger.image_shape is None


def test_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(ValueError, match=r"images and as many labels .*`Mean` from, but got 0 images"):
        Mean().learn(IMAGES[:0], LABELS[:0], 0)
    with pytest.raises(ValueError, match=r"got 12 images and labels of shape \(3,\)"):
        Mean().learn(IMAGES, LABELS[:3], 0)
    with pytest.raises(ValueError, match="two channels do not fit"):
        Mean().learn(IMAGES.view(6, 2, 4, 4), LABELS[:6], 0)
    assert Mean.calls == []
    # What a subclass learns is checked like what comes from a file.
    with pytest.raises(ValueError, match="finite values"):
        learned(Mean(noise=10.0))


def test_only_arguments_of_use_are_recorded() -> None:
    trigger = learned(Mean(ratio=0.25, noise=0.2))
    assert trigger.hyperparameters == {"ratio": 0.25}
    twin = type(trigger)(**trigger.hyperparameters)  # type: ignore[arg-type]
    twin.restore((1, 4, 4), trigger.state_dict())
    assert torch.equal(twin(IMAGES / 255), trigger(IMAGES / 255))


def rule(trigger: Trigger, **options: Any) -> Poison:
    return Poison(trigger, **{"rate": 0.1, "target": 3, "mode": "static", **options})


def data_with(poison: Poison) -> DigitsDataModule:
    return DigitsDataModule(poison, {"inject": 0.5, "other": 0.3, "val": 0.2}, seed=0)


def labels_in(data: DigitsDataModule, *splits: str) -> Tensor:
    return data.train_images.labels[data.positions(splits)].sort().values


def test_learnt_from_the_poisoned_phases_split() -> None:
    data = data_with(rule(Mean()))
    data.setup()
    data.set_phase(PhaseData("clean", ("other",)))
    assert Mean.calls == []
    data.set_phase(PhaseData("poisoned", ("inject",), "static"))
    assert [call.sort().values.tolist() for call in Mean.calls] == [labels_in(data, "inject").tolist()]
    data.test_dataloader()
    data.set_phase(PhaseData("again", ("other",), "dynamic"))
    assert len(Mean.calls) == 1


@pytest.mark.parametrize(("kind", "classes"), [(Mean, {3}), (MeanOfAll, set(range(10)))])
def test_a_clean_label_attacker_may_know_one_class(kind: type[Mean], classes: set[int]) -> None:
    data = data_with(rule(kind(), clean_label=True))
    data.set_phase(PhaseData("poisoned", ("inject",), "static"))
    [seen] = Mean.calls
    assert set(seen.tolist()) == classes
    expected = labels_in(data, "inject")
    assert len(seen) == int(torch.isin(expected, torch.tensor(sorted(classes))).sum())


@pytest.mark.parametrize("use", ["test_dataloader", "val_dataloader", "train_dataloader", "manifest"])
def test_learnt_from_all_but_validation_without_phases(use: str) -> None:
    data = data_with(rule(Mean()))
    data.predict_dataloader()
    data.clean_fit_dataloader()
    assert Mean.calls == []
    getattr(data, use)()
    assert [call.sort().values.tolist() for call in Mean.calls] == [labels_in(data).tolist()]


def test_parts_of_other_triggers_are_learnt() -> None:
    trigger = TrainTestTrigger(SequentialTrigger([SIG(), Mean(0.1)]), Mean(0.4))
    assert len(unlearned(trigger)) == 2
    data = data_with(rule(trigger))
    data.learn_trigger()
    assert unlearned(trigger) == []
    assert trigger.image_shape == (1, 8, 8)
    manifest = data.manifest()
    assert manifest is not None
    assert len(manifest.tensors) == 3
    twin = manifest.build_trigger(Mean)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(twin(images), trigger(images))
    assert torch.equal(twin.attack(images), trigger.attack(images))


def test_a_part_that_was_learnt_by_hand_stays() -> None:
    part = Mean(0.1)
    trigger = SequentialTrigger([part, SIG()])
    data = data_with(rule(trigger))
    data.setup()
    part.learn(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 0)
    before = part.mean.clone()
    manifest = data.manifest()
    assert manifest is not None
    assert len(manifest.tensors) == 2
    assert len(Mean.calls) == 1
    assert torch.equal(part.mean, before)


def test_the_rule_must_know_the_shape() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        rule(Mean()).learn(LABELS, torch.arange(12), IMAGES.__getitem__)


def checkpoint_of(data: DigitsDataModule) -> dict[str, Any]:
    manifest = data.manifest()
    assert manifest is not None
    return {"state_dict": {}, RECORD_KEY: {"manifest": manifest.plain(), "tensors": manifest.tensors}}


def test_a_checkpoints_trigger_is_not_learnt_again(cache: Path) -> None:
    before = data_with(rule(Mean(noise=0.2)))
    checkpoint = checkpoint_of(before)
    data = data_with(rule(Mean()))
    use_manifest_of(checkpoint, PATH, data)
    data.test_dataloader()
    assert len(Mean.calls) == 1
    assert before.poison is not None
    assert data.poison is not None
    assert torch.equal(data.poison.trigger.state_dict()["mean"], before.poison.trigger.state_dict()["mean"])


def test_another_trigger_is_still_refused() -> None:
    checkpoint = checkpoint_of(data_with(rule(Mean(noise=0.2))))
    with pytest.raises(MisconfigurationException, match=r"arguments.ratio: was 0.5, is 0.1"):
        use_manifest_of(checkpoint, PATH, data_with(rule(Mean(ratio=0.1))))
    learnt = data_with(rule(Mean()))
    learnt.learn_trigger()
    with pytest.raises(MisconfigurationException, match="mean: the pixels differ"):
        use_manifest_of(checkpoint, PATH, learnt)
    other = data_with(rule(Mean(ratio=0.1)))
    assert use_manifest_of(checkpoint, PATH, other, override=True) is not None
    assert other.poison is not None
    assert unlearned(other.poison.trigger)


def test_a_manifest_without_pixels_says_the_rest() -> None:
    data = data_with(rule(Mean()))
    manifest = data.manifest(learn=False)
    assert manifest is not None
    assert (manifest.image_shape, manifest.tensors) == ((1, 8, 8), {})
    assert isinstance(PoisonManifest.from_plain(manifest.plain(), {}), PoisonManifest)
    assert Mean.calls == []


def test_override_learns_the_configs() -> None:
    """Also one that differs by what only learning needs, which no manifest says."""
    checkpoint = checkpoint_of(data_with(rule(Mean(noise=0.2))))
    data, twin = data_with(rule(Mean(noise=0.3))), data_with(rule(Mean(noise=0.3)))
    assert use_manifest_of(checkpoint, PATH, data, override=True) is not None
    for each in (data, twin):
        each.test_dataloader()
    assert len(Mean.calls) == 2
    assert torch.equal(pixels_of(data), pixels_of(twin))
    assert not torch.equal(pixels_of(data), checkpoint[RECORD_KEY]["tensors"]["trigger.mean"])


def pixels_of(data: ImageDataModule) -> Tensor:
    assert data.poison is not None
    (part,) = (each for each in data.poison.trigger.modules() if isinstance(each, Mean))
    return part.mean


def trainer_of(folder: Path, phases: dict[str, Phase], **options: Any) -> CommandTrainer:
    trainer = CommandTrainer(
        phases=phases, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder, **options
    )
    trainer.show_results = False
    return trainer


def poisoned(split: str, **options: Any) -> Phase:
    return Phase(split=split, poisoned="static", max_epochs=1, **options)


def model() -> BackdoorClassifier:
    return BackdoorClassifier(small_cnn(10, in_channels=1, width=2), num_classes=10)


def forget(cache: Path) -> None:
    for file in cache.iterdir():
        file.unlink()


def nested() -> SequentialTrigger:
    return SequentialTrigger([SIG(), Mean()])


@pytest.mark.parametrize("make", [Mean, nested])
def test_a_poisoned_folder_is_not_learnt_from(tmp_path: Path, cache: Path, make: Callable[[], Trigger]) -> None:
    written = data_with(rule(make()))
    trainer_of(tmp_path, {"inject": poisoned("inject")}).poison(LightningModule(), written, tmp_path / "copy")
    forget(cache)
    data = ImageFolderDataModule(tmp_path / "copy", poison=rule(make(), mode="dynamic"), seed=0)
    trainer_of(tmp_path / "run", {"inject": Phase(max_epochs=1)}).fit(model(), datamodule=data)
    assert len(Mean.calls) == 1
    assert torch.equal(pixels_of(data), pixels_of(written))
    assert data.poison is not None
    assert unlearned(data.poison.trigger) == []
    expected, found = (PoisonManifest.load(tmp_path / name).tensors for name in ("copy", "run"))
    assert all(torch.equal(found[name], expected[name]) for name in found if name.startswith("trigger."))
    # A poisoned phase asks for it before any test.
    again = ImageFolderDataModule(tmp_path / "copy", poison=rule(make()), seed=0)
    again.set_phase(PhaseData("twice", (), "static"))
    assert torch.equal(pixels_of(again), pixels_of(written))
    assert len(Mean.calls) == 1


def test_a_poisoned_folder_with_another_trigger_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    trainer_of(tmp_path, {}).poison(LightningModule(), data_with(rule(Mean())), folder)

    def refused(why: str, trigger: Trigger | None = None, size: int | None = None) -> None:
        data = ImageFolderDataModule(folder, poison=rule(trigger or Mean()), image_size=size)
        with pytest.raises(MisconfigurationException, match=rf"is not learnt from the images in .*{why}"):
            data.test_dataloader()

    refused(r"(?s:.)*trigger\.arguments\.ratio: was 0\.5, is 0\.25\n\(folder against config\)", Mean(ratio=0.25))
    refused(r"(?s:.)*trigger\.class: was .*Mean", MeanOfAll())
    refused(r"(?s:.)*image_shape\.1: was 8, is 16", size=16)
    manifest = PoisonManifest.load(folder)
    replace(manifest, tensors={"trigger.mean": torch.full((1, 8, 8), 2.0)}).save(folder)
    refused(r"cannot be taken over: .*Mean cannot be built: .*finite values(?s:.)*Restore `manifest.json`")
    (folder / "manifest.safetensors").unlink()
    refused(r"cannot be taken over: Cannot read the poison manifest")
    assert len(Mean.calls) == 1
    # Without an attack to measure it is a data set like any other.
    assert len(ImageFolderDataModule(folder).test_dataloader()) == 1
    ImageFolderDataModule(folder, poison=rule(SIG())).test_dataloader()


def final_pixels(folder: Path) -> dict[str, Tensor]:
    found = {path.parent.name.partition("_")[2]: read_checkpoint(path) for path in folder.glob("*/final.ckpt")}
    return {name: checkpoint[RECORD_KEY]["tensors"]["trigger.mean"] for name, checkpoint in found.items()}


LATER = {
    "second": poisoned("other", start_from="init"),
    "first": poisoned("inject", start_from="init"),
    "fine": Phase(split="other", max_epochs=1, start_from="first"),
}


@pytest.fixture
def begun(tmp_path: Path, cache: Path) -> Path:
    """The folder of a run of one phase, whose trigger is nowhere else."""
    torch.manual_seed(0)
    trainer_of(tmp_path / "run", {"first": poisoned("inject")}).fit(model(), datamodule=data_with(rule(Mean())))
    assert len(Mean.calls) == 1
    forget(cache)
    return tmp_path / "run"


def test_a_run_goes_on_with_its_trigger(begun: Path) -> None:
    torch.manual_seed(0)
    data = data_with(rule(Mean()))
    trainer_of(begun, LATER).fit(model(), datamodule=data)
    assert len(Mean.calls) == 1
    pixels = final_pixels(begun)
    assert sorted(pixels) == ["fine", "first", "second"]
    assert all(torch.equal(pixels[name], pixels["first"]) for name in pixels)
    assert torch.equal(pixels_of(data), pixels["first"])
    assert torch.equal(PoisonManifest.load(begun).tensors["trigger.mean"], pixels["first"])


def test_a_run_that_starts_over_learns_anew(begun: Path) -> None:
    PoisonManifest.load(begun).with_trigger(learned_from_zeros()).save(begun)
    trainer = trainer_of(begun, {"first": poisoned("inject")})
    trainer.fresh = True
    data = data_with(rule(Mean()))
    trainer.fit(model(), datamodule=data)
    assert len(Mean.calls) == 3
    assert torch.equal(pixels_of(data), final_pixels(begun)["first"])
    assert not torch.equal(pixels_of(data), learned_from_zeros().mean)


def learned_from_zeros() -> Mean:
    trigger = Mean()
    trigger.learn(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 3)
    return trigger


def test_a_run_does_not_go_on_with_another_trigger(begun: Path) -> None:
    data = data_with(rule(learned_from_zeros()))
    with pytest.raises(MisconfigurationException, match=r"`Mean` was learnt again and its pixels differ"):
        trainer_of(begun, LATER).fit(model(), datamodule=data)
    assert not list(begun.glob("*_second"))
    for name in ("manifest.json", "manifest.safetensors"):
        (begun / name).unlink()
    torch.manual_seed(0)
    with pytest.raises(
        MisconfigurationException, match=r"trigger of .*first/final\.ckpt is not this run's: `Mean` was"
    ):
        trainer_of(begun, LATER).fit(model(), datamodule=data_with(rule(Mean())))
    assert not list(begun.glob("*_fine/final.ckpt"))


def test_what_was_learnt_must_be_recorded(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", {"inject": poisoned("inject")}, save_manifest=False)
    with pytest.raises(
        MisconfigurationException, match=r"`SequentialTrigger` is learnt .*`trainer.save_manifest: true`"
    ):
        trainer.fit(model(), datamodule=data_with(rule(nested())))
    assert Mean.calls == []
    trainer = trainer_of(tmp_path / "run", {"clean": Phase(split="inject", max_epochs=1)}, save_manifest=False)
    trainer.fit(model(), datamodule=data_with(rule(Mean())))


@pytest.mark.parametrize("command", ["preview", "poison", "test", "override"])
def test_commands_learn_from_the_first_poisoned_phase(tmp_path: Path, command: str) -> None:
    """As the run of the phases does."""
    clean = Phase(split="val", max_epochs=1)
    phases = {"clean": clean, "inject": poisoned("inject"), "again": poisoned("other")}
    data, trainer = data_with(rule(Mean())), trainer_of(tmp_path, phases)
    if command == "preview":
        trainer.preview(LightningModule(), data, images=1, max_images=10)
    elif command == "poison":
        trainer.poison(LightningModule(), data, tmp_path / "copy", phase="again")
    elif command == "test":
        trainer.test(model(), datamodule=data, verbose=False)
    else:
        manifest = data_with(rule(SIG())).manifest()
        assert manifest is not None
        record = {"manifest": manifest.plain(), "tensors": manifest.tensors}
        classifier = model()
        save_atomically({"state_dict": classifier.state_dict(), RECORD_KEY: record}, tmp_path / "some.ckpt")
        trainer.override_trigger = True
        trainer.sharpness(classifier, data, tmp_path / "some.ckpt", steps=1, iterations=1, max_images=10)
    assert [call.sort().values.tolist() for call in Mean.calls] == [labels_in(data, "inject").tolist()]


CONFIG = """
seed_everything: 1
model:
  backbone: {class_path: lightning_bd.backbones.small_cnn, init_args: {num_classes: 10, in_channels: 1, width: 2}}
  num_classes: 10
data:
  class_path: lightning_bd.datamodules.DigitsDataModule
  init_args:
    splits: {inject: 0.8, defend: 0.2}
    subset: 200
    poison:
      trigger: {class_path: lightning_bd.triggers.SSBA, init_args: {bits: 2, width: 1, steps: 2}}
      rate: 0.1
      target: 0
trainer:
  accelerator: cpu
  enable_progress_bar: false
  logger: false
  phases:
    inject:
      split: inject
      poisoned: static
      max_epochs: 1
      optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05}}
    clean:
      split: defend
      max_epochs: 1
      optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05}}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_the_commands_learn_once(
    lightning_bd: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("ssba.yaml").write_text(CONFIG)
    calls = []
    learn = SSBA._learn

    def counted(self: SSBA, images: Tensor, labels: Tensor, target: int | None) -> dict[str, Tensor]:
        calls.append(len(images))
        return learn(self, images, labels, target)

    monkeypatch.setattr(SSBA, "_learn", counted)
    outcome = lightning_bd("fit", "--config", "ssba.yaml", "--trainer.default_root_dir=run")
    assert outcome.status == 0, outcome.err
    assert calls == [160]
    for file in cache.iterdir():
        file.unlink()
    for extra in ([], ["--data.poison", "null"]):
        outcome = lightning_bd("test", "--config", "ssba.yaml", "--ckpt_path", "run/01_clean/final.ckpt", *extra)
        assert outcome.status == 0, outcome.err
        assert "attack_success_rate" in outcome.out
    assert calls == [160]
    refused = ["--data.poison.trigger.init_args.epsilon", "0.5"]
    outcome = lightning_bd("test", "--config", "ssba.yaml", "--ckpt_path", "run/01_clean/final.ckpt", *refused)
    outcome.check_refused(["is not the config's", "arguments.epsilon"])
    assert calls == [160]
