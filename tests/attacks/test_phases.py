"""A trained trigger in runs of phases: who gets which weights, what is saved when, and what a defender sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_bd.attacks.generator_training import GeneratorTraining
from lightning_bd.attacks.lira import LIRA
from lightning_bd.callbacks import FineTuning
from lightning_bd.checkpointing import RECORD_KEY, read_checkpoint
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.manifest import PoisonManifest
from lightning_bd.phases import MultiPhaseTrainer, Phase
from lightning_bd.triggers import LIRATrigger

if TYPE_CHECKING:
    from tests.attacks.conftest import Lab

SPLITS = {"attack": 0.6, "clean": 0.2, "defend": 0.2}
GREY = torch.full((1, 1, 8, 8), 0.5)


class Spy(Callback):
    """What each phase starts with."""

    def __init__(self, data: DigitsDataModule) -> None:
        self.data = data
        self.noise: dict[str, Tensor] = {}
        self.callbacks: dict[str, list[Callback]] = {}
        self.last: dict[str, dict[str, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        return self

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = Path(trainer.default_root_dir).name[3:]
        self.noise[name] = noise_of(self.data)
        self.callbacks[name] = [*trainer.callbacks]  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for path in Path(trainer.default_root_dir).glob("**/last.ckpt"):
            self.last[Path(trainer.default_root_dir).name[3:]] = read_checkpoint(path)


def noise_of(data: DigitsDataModule) -> Tensor:
    assert data.poison is not None
    assert isinstance(data.poison.trigger, LIRATrigger)
    return data.poison.trigger.noise(GREY)


def noise_in(run: Path, phase: str) -> Tensor:
    (path,) = run.glob(f"[0-9][0-9]_{phase}/final.ckpt")
    return noise_of_record(read_checkpoint(path)[RECORD_KEY])


def noise_of_record(record: dict[str, Any]) -> Tensor:
    trigger = PoisonManifest.from_plain(record["manifest"], record["tensors"]).build_trigger()
    assert isinstance(trigger, LIRATrigger)
    return trigger.noise(GREY)


def model_of(lab: Lab) -> LIRA:
    return LIRA(lab.backbone(), 10, generator_lr=0.01)


def data_of(lab: Lab) -> DigitsDataModule:
    return lab.data(lab.lira_trigger(), splits=SPLITS, subset=160)


def trainer_of(folder: Path, phases: dict[str, Phase] | None, *callbacks: Callback, **others: Any) -> MultiPhaseTrainer:
    trainer = MultiPhaseTrainer(
        phases=phases, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder,
        callbacks=list(callbacks), **others,
    )  # fmt: skip
    trainer.show_results = False
    return trainer


def tree() -> dict[str, Phase]:
    return {
        "attack": Phase(split="attack", poisoned=True, max_epochs=2),
        "clean": Phase(split="clean", max_epochs=1),
        "again": Phase(split="attack", poisoned=True, max_epochs=1),
        "defend-ft": Phase(
            split="defend",
            start_from="attack",
            max_epochs=1,
            callbacks=[FineTuning([0.01], max_drop=1.0, max_epochs=1)],
        ),
        "other": Phase(split="attack", poisoned=True, start_from="init", max_epochs=1),
    }


@pytest.fixture(scope="module")
def done(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spy, Tensor]:
    """A finished run: its folder, what each phase started with, and the trigger that was left."""
    folder, data = tmp_path_factory.mktemp("run"), data_of(lab)
    spy = Spy(data)
    data.setup()
    spy.noise["init"] = noise_of(data)
    trainer_of(folder, tree(), spy).fit(model_of(lab), datamodule=data)
    return folder, spy, noise_of(data)


def test_each_phase_starts_with_the_trigger_of_the_one_it_starts_from(done: tuple[Path, Spy, Tensor]) -> None:
    folder, spy, left = done
    assert torch.equal(spy.noise["attack"], spy.noise["init"])
    assert torch.equal(spy.noise["other"], spy.noise["init"])
    for name, parent in (("clean", "attack"), ("again", "clean"), ("defend-ft", "attack")):
        assert torch.equal(spy.noise[name], noise_in(folder, parent)), name
    # Only poisoned phases train it.
    assert not torch.equal(noise_in(folder, "attack"), spy.noise["init"])
    assert torch.equal(noise_in(folder, "clean"), noise_in(folder, "attack"))
    assert not torch.equal(noise_in(folder, "again"), noise_in(folder, "attack"))
    assert torch.equal(noise_in(folder, "defend-ft"), noise_in(folder, "attack"))
    assert not torch.equal(noise_in(folder, "other"), noise_in(folder, "attack"))
    assert torch.equal(left, noise_in(folder, "other"))


def test_the_manifest_is_of_the_moment_when_it_is_written(done: tuple[Path, Spy, Tensor]) -> None:
    folder, spy, _ = done
    trigger = PoisonManifest.load(folder).build_trigger()
    assert isinstance(trigger, LIRATrigger)
    assert torch.equal(trigger.noise(GREY), noise_in(folder, "other"))
    # The last epoch's checkpoint and the final one.
    assert torch.equal(noise_of_record(spy.last["attack"][RECORD_KEY]), noise_in(folder, "attack"))
    assert (folder / "trigger.png").is_file()


def test_a_defender_sees_nothing_of_it(done: tuple[Path, Spy, Tensor]) -> None:
    _, spy, _ = done
    trains = {name: any(isinstance(c, GeneratorTraining) for c in found) for name, found in spy.callbacks.items()}
    assert trains == {"attack": True, "clean": False, "again": True, "defend-ft": False, "other": True}
    checkpoint = spy.last["defend-ft"]
    assert not [name for name in checkpoint if "trigger" in name]
    assert checkpoint[RECORD_KEY]["tensors"] == {}
    names = set(checkpoint["state_dict"])
    assert not any("trigger" in name or "network" in name for name in names)


@pytest.mark.parametrize("kind", [LIRA, BackdoorClassifier])
def test_a_checkpoint_is_measured_with_its_own_trigger(
    done: tuple[Path, Spy, Tensor], lab: Lab, kind: type[BackdoorClassifier], tmp_path: Path
) -> None:
    folder, _, _ = done
    for line in (folder / "results.csv").read_text().splitlines()[1:]:
        row = dict(
            zip((folder / "results.csv").read_text().splitlines()[0].split(","), line.split(","), strict=True)
        )  # fmt: skip
        (path,) = folder.glob(f"*_{row['phase']}/final.ckpt")
        model = kind(lab.backbone(), 10)
        metrics = trainer_of(tmp_path, None).test(model, datamodule=data_of(lab), ckpt_path=path, verbose=False)[0]
        assert metrics["test/attack_success_rate"] == pytest.approx(float(row["attack_success_rate"]), abs=1e-4)
        assert metrics["test/clean_accuracy"] == pytest.approx(float(row["clean_accuracy"]), abs=1e-4)


def test_another_trigger_is_still_refused(done: tuple[Path, Spy, Tensor], lab: Lab, tmp_path: Path) -> None:
    (path,) = done[0].glob("*_attack/final.ckpt")
    data = lab.data(lab.lira_trigger(strength=0.2), splits=SPLITS, subset=160)
    with pytest.raises(MisconfigurationException, match="strength"):
        trainer_of(tmp_path, None).test(model_of(lab), datamodule=data, ckpt_path=path, verbose=False)


def copy_of_row(folder: Path, phase: str) -> dict[str, str]:
    lines = [line.split(",") for line in (folder / "results.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    (row,) = [row for row in rows if row["phase"] == phase]
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize(("phase", "epoch"), [("attack", 1), ("clean", 0), ("again", 0), ("other", 0)])
def test_a_cut_run_ends_as_an_uncut_one(
    done: tuple[Path, Spy, Tensor], lab: Lab, tmp_path: Path, phase: str, epoch: int
) -> None:
    class CutPhase(lab.cut):  # type: ignore[name-defined, misc]
        def on_train_batch_start(self, trainer: Trainer, *others: Any) -> None:
            if Path(trainer.default_root_dir).name[3:] == phase:
                super().on_train_batch_start(trainer, *others)

    phases = {name: value for name, value in tree().items() if name != "defend-ft"}
    if phase in ("clean",):
        phases["clean"] = Phase(split="clean", max_epochs=1, batch_size=8)
        del phases["again"], phases["other"]
    with pytest.raises(ConnectionAbortedError):
        trainer_of(tmp_path, phases, CutPhase(epoch)).fit(model_of(lab), datamodule=data_of(lab))
    # Another process, which builds the trigger anew.
    data = data_of(lab)
    trainer_of(tmp_path, phases).fit(model_of(lab), datamodule=data)
    if phase == "clean":
        assert torch.equal(noise_in(tmp_path, "clean"), noise_in(done[0], "attack"))
        assert json.loads((tmp_path / "manifest.json").read_text())["trigger"]["class"] == "LIRATrigger"
        return
    for name in phases:
        assert torch.equal(noise_in(tmp_path, name), noise_in(done[0], name)), name
        (path,), (expected,) = (run.glob(f"*_{name}/final.ckpt") for run in (tmp_path, done[0]))
        state, other = read_checkpoint(path)["state_dict"], read_checkpoint(expected)["state_dict"]
        assert all(torch.equal(state[key], other[key]) for key in other), name
        assert copy_of_row(tmp_path, name) == copy_of_row(done[0], name)
    trigger = PoisonManifest.load(tmp_path).build_trigger()
    assert isinstance(trigger, LIRATrigger)
    assert torch.equal(trigger.noise(GREY), noise_in(done[0], "other"))
    # Once more: everything is finished, and the manifest is still the trained one.
    data = data_of(lab)
    trainer_of(tmp_path, phases).fit(model_of(lab), datamodule=data)
    assert torch.equal(noise_of(data), noise_in(done[0], "other"))
    trigger = PoisonManifest.load(tmp_path).build_trigger()
    assert isinstance(trigger, LIRATrigger)
    assert torch.equal(trigger.noise(GREY), noise_of(data))


def test_without_a_manifest_it_cannot_be_passed_on(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"`LIRATrigger` is trained.*`trainer.save_manifest: true`"):
        trainer_of(tmp_path, tree(), save_manifest=False).fit(model_of(lab), datamodule=data_of(lab))


def test_replayed_batches_carry_no_graph(lab: Lab, tmp_path: Path) -> None:
    class Replay(Callback):
        count = 0

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, _: int) -> None:
            for replayed in trainer.datamodule.reference_batches():  # type: ignore[attr-defined]
                assert not replayed.image.requires_grad
                assert len(replayed) == 5
                Replay.count += int(replayed.is_poisoned.sum())

    phases = {"attack": Phase(split="attack", poisoned=True, max_epochs=1),
              "again": Phase(split="attack", poisoned=True, max_epochs=1, callbacks=[Replay()])}  # fmt: skip
    trainer_of(tmp_path, phases).fit(model_of(lab), datamodule=data_of(lab))
    assert Replay.count > 20
