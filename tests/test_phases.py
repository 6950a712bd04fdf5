"""Runs of several phases from Python: the tree, what each phase gets, what is left on disk, and what is refused."""

import csv
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.batch import PoisonMode, Sample
from lightning_bd.callbacks import ElasticWeightConsolidation, FineTuning, SharpnessAwareMinimization
from lightning_bd.callbacks.defense import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.checkpointing import RECORD_KEY, CheckpointError, read_checkpoint
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DefenderView, ImageDataModule
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.functional.backdoor import wilson_interval
from lightning_bd.functional.fisher import fisher_sums
from lightning_bd.manifest import PoisonManifest
from lightning_bd.phase_callbacks import NonFiniteLossError
from lightning_bd.phases import MultiPhaseTrainer, Phase
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

SPLITS = {"inject": 0.5, "consolidate": 0.25, "defend": 0.25}
TRAIN, TEST, CLASSES = 160, 80, 4

Phases = dict[str, Phase] | list[Phase] | None


class Bars(ImageDataModule):
    """One bright column per class in noise; 8 x 8 pixels, grey."""

    def load(self, train: bool) -> TensorImages:
        count = TRAIN if train else TEST
        generator = torch.Generator().manual_seed(int(train))
        labels = torch.arange(count) % CLASSES
        images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
        images[torch.arange(count), :, :6, 1 + labels] += 100
        return TensorImages(images.to(torch.uint8), labels, ("a", "b", "c", "d"))


def bars(seed: int = 3, rate: float = 0.5, **others: Any) -> Bars:
    arguments: dict[str, Any] = {"splits": SPLITS, "batch_size": 16, "augment": "none", "seed": seed, **others}
    return Bars(Poison(BadNets(size=2, pattern="white"), rate=rate, target=0), **arguments)


def network(width: int = 4, dropout: float = 0.2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveMaxPool2d(4), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(16 * width, CLASSES),
    )  # fmt: skip


def classifier(width: int = 4, seed: int = 0) -> BackdoorClassifier:
    torch.manual_seed(seed)
    return BackdoorClassifier(network(width), CLASSES)


def sgd(lr: float = 0.05, momentum: float = 0.9) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)

    return make


def runner(folder: Path, phases: Phases, **others: Any) -> MultiPhaseTrainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu", "enable_progress_bar": False, "logger": False, "default_root_dir": folder, **others
    }  # fmt: skip
    return MultiPhaseTrainer(phases=phases, **arguments)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def final(folder: Path, phase: str) -> dict[str, Tensor]:
    (path,) = folder.glob(f"[0-9][0-9]_{phase}/final.ckpt")
    state: dict[str, Tensor] = read_checkpoint(path)["state_dict"]
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return {row["phase"]: row for row in csv.DictReader(file)}


class Recorder(Callback):
    """Sees every phase; is never copied, so that the test can ask it."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.start: dict[str, dict[str, Tensor]] = {}
        self.trainers: dict[str, Trainer] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.data: dict[str, object] = {}
        self.rates: dict[str, list[float]] = {}
        self.sizes: dict[str, list[int]] = {}
        self.batches: dict[str, list[Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        return self

    @staticmethod
    def name(trainer: Trainer) -> str:
        return Path(trainer.default_root_dir).name[3:]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = self.name(trainer)
        self.order.append(name)
        self.start[name] = weights(pl_module)
        self.trainers[name] = trainer
        self.data[name] = trainer.datamodule  # type: ignore[attr-defined]
        self.rates[name], self.sizes[name], self.batches[name] = [], [], []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.optimizers[self.name(trainer)] = trainer.optimizers[0]
        self.rates[self.name(trainer)].append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: list[Tensor], batch_idx: int
    ) -> None:
        self.sizes[self.name(trainer)].append(len(batch[1]))
        self.batches[self.name(trainer)].append(batch)


class Cut(Callback):
    """Ends the process' work, as far as one process can tell: an exception before epoch ``epoch`` of ``phase``."""

    def __init__(self, phase: str, epoch: int, batch: int = 1) -> None:
        self.place = (phase, epoch, batch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: list[Tensor], batch_idx: int
    ) -> None:
        if (Recorder.name(trainer), trainer.current_epoch, batch_idx) == self.place:
            raise ConnectionAbortedError(f"cut at {self.place}")


def test_each_phase_starts_from_its_parents_final_weights(tmp_path: Path) -> None:
    recorder, model = Recorder(), classifier()
    initial = weights(model)
    phases = [
        Phase("late", start_from="middle", split="defend", max_epochs=1),
        Phase("middle", start_from="first", split="consolidate", max_epochs=1),
        Phase("first", start_from="init", split="inject", max_epochs=2, optimizer=sgd()),
        Phase("baseline", start_from="init", split="inject", max_epochs=1),
        Phase("after-baseline", split="consolidate", max_epochs=1),
        Phase("branch", start_from="first", split="defend", max_epochs=1),
    ]
    runner(tmp_path, phases, callbacks=[recorder]).fit(model, datamodule=bars())
    assert recorder.order == ["first", "middle", "late", "baseline", "after-baseline", "branch"]
    parents = {"late": "middle", "middle": "first", "after-baseline": "baseline", "branch": "first"}
    for name, parent in parents.items():
        assert same(recorder.start[name], final(tmp_path, parent)), name
        assert not same(final(tmp_path, name), final(tmp_path, parent)), name
    for name in ("first", "baseline"):
        assert same(recorder.start[name], initial), name
    assert same(weights(model), final(tmp_path, "branch"))
    # Folders and rows keep the order of the list.
    assert list(table(tmp_path)) == [str(phase.name) for phase in phases]
    assert [path.name for path in sorted(tmp_path.glob("[0-9]*"))][:2] == ["00_late", "01_middle"]
    assert {row["phase"]: row["start_from"] for row in table(tmp_path).values()} == {
        **parents, "first": "init", "baseline": "init"
    }  # fmt: skip


def test_the_same_phase_is_the_same_wherever_it_stands(tmp_path: Path) -> None:
    inject = Phase(split="inject", poisoned=True, max_epochs=1, optimizer=sgd())
    other = Phase(split="consolidate", start_from="init", max_epochs=1, optimizer=sgd())
    runner(tmp_path / "alone", {"inject": inject}).fit(classifier(), datamodule=bars())
    runner(tmp_path / "last", {"other": other, "inject": Phase(**{**vars(inject), "start_from": "init"})}).fit(
        classifier(), datamodule=bars()
    )
    assert same(final(tmp_path / "alone", "inject"), final(tmp_path / "last", "inject"))


def test_each_phase_has_its_own_settings(tmp_path: Path) -> None:
    recorder, sam = Recorder(), SharpnessAwareMinimization(rho=0.1)
    phases = {
        "one": Phase(
            split="inject", batch_size=20, max_epochs=3, optimizer=sgd(0.08, 0.5), callbacks=[sam],
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            trainer={"gradient_clip_val": 0.7, "accumulate_grad_batches": 2},
        ),
        "two": Phase(split="consolidate", max_epochs=2, optimizer=lambda p: torch.optim.AdamW(p, lr=0.002)),
        "three": Phase(split=["consolidate", "defend"], max_epochs=1),
    }  # fmt: skip
    runner(tmp_path, phases, callbacks=[recorder], gradient_clip_val=2.0).fit(classifier(), datamodule=bars())
    assert recorder.rates == {"one": [0.08, 0.04, 0.02], "two": [0.002, 0.002], "three": [0.01]}
    # inject has 80 images: batches of 20; consolidate has 40: 16 + 16 + 8, where the datamodule decides.
    assert recorder.sizes == {"one": [20] * 12, "two": [16, 16, 8] * 2, "three": [16] * 5}
    assert {name: type(optimizer).__name__ for name, optimizer in recorder.optimizers.items()} == {
        "one": "SGD", "two": "AdamW", "three": "SGD"
    }  # fmt: skip
    # The model's own optimizer where the phase brings none.
    assert [recorder.optimizers[name].param_groups[0].get("momentum") for name in ("one", "three")] == [0.5, 0.9]
    settings = {name: (t.gradient_clip_val, t.accumulate_grad_batches) for name, t in recorder.trainers.items()}
    assert settings == {"one": (0.7, 2), "two": (2.0, 1), "three": (2.0, 1)}
    found = {name: sum(isinstance(c, SharpnessAwareMinimization) for c in t.callbacks)  # type: ignore[attr-defined]
             for name, t in recorder.trainers.items()}  # fmt: skip
    assert found == {"one": 1, "two": 0, "three": 0}
    assert len({id(trainer) for trainer in recorder.trainers.values()}) == 3
    # Steps from init: 3 epochs of 4 batches, two per step; 2 epochs of 3; 5 batches.
    assert [int(row["steps"]) for row in table(tmp_path).values()] == [6, 12, 17]


def test_a_phase_trains_on_its_split_only(tmp_path: Path) -> None:
    recorder, data = Recorder(), bars()
    phases = {
        "inject": Phase(split="inject", poisoned=True, max_epochs=1),
        "both": Phase(split=["inject", "consolidate"], max_epochs=1),
        "all": Phase(max_epochs=1),
    }
    runner(tmp_path, phases, callbacks=[recorder]).fit(classifier(), datamodule=data)
    splits = {"inject": ("inject",), "both": ("inject", "consolidate"), "all": ("inject", "consolidate", "defend")}
    for name, members in splits.items():
        seen = torch.cat([batch.index for batch in recorder.batches[name]])
        assert seen.sort().values.tolist() == data.positions(members).tolist()
    share = {
        name: torch.cat([b.is_poisoned for b in batches]).float().mean() for name, batches in recorder.batches.items()
    }
    assert 0.3 < share["inject"] < 0.7
    assert share["both"] == share["all"] == 0


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_phase_may_choose_the_mode_of_the_poison(tmp_path: Path, mode: PoisonMode) -> None:
    recorder = Recorder()
    phases = {"inject": Phase(split="inject", poisoned=mode, max_epochs=2)}
    runner(tmp_path, phases, callbacks=[recorder]).fit(classifier(), datamodule=bars())
    poisoned = [
        set(torch.cat([b.index[b.is_poisoned] for b in recorder.batches["inject"][5 * epoch : 5 * epoch + 5]]).tolist())
        for epoch in range(2)
    ]
    assert (poisoned[0] == poisoned[1]) == (mode == "static")


def test_what_the_user_handed_over_is_left_alone(tmp_path: Path) -> None:
    class Counter(Callback):
        def __init__(self) -> None:
            self.calls = 0

        def on_train_batch_start(self, *_: object) -> None:
            self.calls += 1

    model, counter, mine = classifier(), Counter(), Counter()
    callbacks: list[Callback] = [counter]
    phase = Phase(split="inject", max_epochs=1, optimizer=sgd(), callbacks=[mine])
    phases = {"one": phase, "two": Phase(max_epochs=1)}
    before, threads = set(vars(model)), torch.get_num_threads()
    runner(tmp_path, phases, callbacks=callbacks).fit(model, datamodule=bars())
    assert callbacks[0] is counter
    assert counter.calls == 0
    assert phase.name is None
    assert phase.callbacks == [mine]
    assert set(vars(model)) - before <= {"_hparams"}  # Lightning makes it when asked for
    assert type(model).configure_optimizers is BackdoorClassifier.configure_optimizers
    assert torch.get_num_threads() == threads


def test_threads_only_for_the_run(tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(Recorder):
        def on_train_start(self, *_: object) -> None:
            seen.append(torch.get_num_threads())

    threads = torch.get_num_threads()
    number = threads + 1
    phases = {"one": Phase(max_epochs=1)}
    try:
        runner(tmp_path, phases, callbacks=[Look()], num_threads=number, limit_train_batches=1).fit(
            classifier(), datamodule=bars()
        )
        assert seen == [number]
    finally:
        assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="Expected argument `num_threads` to be a positive integer, but got 0"):
        runner(tmp_path, phases, num_threads=0)


@pytest.mark.parametrize(("cap", "epochs"), [(None, [3, 1, 2]), (1, [1, 1, 1]), (2, [2, 1, 2])])
def test_max_epochs_of_the_trainer_caps_every_phase(tmp_path: Path, cap: int | None, epochs: list[int]) -> None:
    phases = {
        "one": Phase(split="inject", max_epochs=3),
        "two": Phase(split="consolidate", max_epochs=1),
        "defend": Phase(split="defend", max_epochs=0, callbacks=[FineTuning([0.01], max_epochs=2, max_drop=1.0)]),
    }
    runner(tmp_path, phases, max_epochs=cap).fit(classifier(), datamodule=bars())
    assert [int(row["epochs"]) for row in table(tmp_path).values()] == epochs


def test_a_phase_takes_the_trainers_epochs_where_it_has_none(tmp_path: Path) -> None:
    runner(tmp_path, {"one": Phase()}, max_epochs=2).fit(classifier(), datamodule=bars())
    assert table(tmp_path)["one"]["epochs"] == "2"


def test_consolidation_measures_on_the_triggered_data_of_the_phase_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[Tensor, Tensor]] = []

    def spy(model: nn.Module, batches: Iterable[Any], *args: Any, **kwargs: Any) -> object:
        kept = [(batch[0], batch[1]) for batch in batches]
        measured.extend(kept)
        return fisher_sums(model, iter(kept), *args, **kwargs)

    monkeypatch.setattr("lightning_bd.callbacks.continual.elastic_weight_consolidation.fisher_sums", spy)
    phases = {
        "inject": Phase(split="inject", poisoned=True, max_epochs=1),
        "clean": Phase(split="consolidate", max_epochs=1, callbacks=[ElasticWeightConsolidation()]),
        "again": Phase(split="consolidate", max_epochs=1, callbacks=[ElasticWeightConsolidation()]),
    }
    data = bars()
    runner(tmp_path, phases).fit(classifier(), datamodule=data)
    sizes = [len(data.positions((name,))) for name in ("inject", "consolidate")]
    images, labels = (torch.cat(column) for column in zip(*measured, strict=True))
    assert len(images) == sum(sizes)
    triggered = (images[:, :, 6:, 6:] == 1).flatten(1).all(dim=1)
    # `clean` starts from the poisoned phase, of whose images about half carried the trigger; `again` from a clean one.
    assert 0.3 < triggered[: sizes[0]].float().mean() < 0.7
    assert not triggered[sizes[0] :].any()
    assert (labels[: sizes[0]][triggered[: sizes[0]]] == 0).all()


def test_a_first_phase_has_nothing_to_consolidate(tmp_path: Path) -> None:
    phases = {"clean": Phase(max_epochs=1, callbacks=[ElasticWeightConsolidation()])}
    with pytest.raises(MisconfigurationException, match="starts from no other phase, so there is no earlier data"):
        runner(tmp_path, phases).fit(classifier(), datamodule=bars())


def test_a_defending_phase_sees_a_clean_view_only(tmp_path: Path) -> None:
    recorder, data = Recorder(), bars()
    phases = {
        "inject": Phase(split="inject", poisoned=True, max_epochs=1),
        "defend-x": Phase(split="consolidate", start_from="inject", max_epochs=1),
        "by-split": Phase(split="defend", start_from="inject", max_epochs=1),
        "by-callback": Phase(
            split="consolidate", start_from="inject", max_epochs=1, callbacks=[FineTuning([0.01], 1.0, 1)]
        ),
    }
    runner(tmp_path, phases, callbacks=[recorder]).fit(classifier(), datamodule=data)
    assert recorder.data["inject"] is data
    for name in ("defend-x", "by-split", "by-callback"):
        view = recorder.data[name]
        assert type(view) is DefenderView, name
        assert not any(value is data or isinstance(value, Poison) for value in vars(view).values()), name
        for batch in recorder.batches[name]:
            assert type(batch) is tuple or (isinstance(batch, list) and not isinstance(batch, Sample))
            assert len(batch) == 2
    # Four fifths of 40 images are for training.
    assert sum(recorder.sizes["defend-x"]) == 32
    rows = table(tmp_path)
    assert rows["by-callback"]["epochs"] == "2"
    assert rows["by-callback"]["note"] == "lr 0.01"


def test_a_defending_phase_cannot_be_poisoned(tmp_path: Path) -> None:
    phases = {"defend": Phase(split="defend", poisoned=True, max_epochs=1)}
    with pytest.raises(MisconfigurationException, match=r"Phase `defend` defends .*, so it cannot be `poisoned`"):
        runner(tmp_path, phases).fit(classifier(), datamodule=bars())


def by_hand(state: dict[str, Tensor], data: Bars) -> tuple[float, float, float]:
    """Clean accuracy, attack success rate and robust accuracy from pixels alone."""
    net = network()
    net.load_state_dict(
        {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    )
    net.eval()
    stored = data.load(train=False)
    images, labels = stored.images / 255, stored.labels
    triggered = images[labels != 0].clone()
    triggered[:, :, 6:, 6:] = 1
    with torch.no_grad():
        clean, attacked = net(images).argmax(1), net(triggered).argmax(1)
    right = [clean == labels, attacked == 0, attacked == labels[labels != 0]]
    accuracy, success, robust = (float(hits.double().mean()) for hits in right)
    return accuracy, success, robust


def test_results_are_those_of_the_final_checkpoints(tmp_path: Path) -> None:
    phases = {
        "inject": Phase(split="inject", poisoned=True, max_epochs=6, optimizer=sgd()),
        "clean": Phase(split="consolidate", max_epochs=2, optimizer=sgd()),
        "defend": Phase(split="defend", start_from="inject", max_epochs=1, optimizer=sgd()),
    }
    data = bars()
    runner(tmp_path, phases).fit(classifier(), datamodule=data)
    rows = table(tmp_path)
    assert list(rows) == ["inject", "clean", "defend"]
    for name, row in rows.items():
        shown = [float(row[key]) for key in ("clean_accuracy", "attack_success_rate", "robust_accuracy")]
        assert shown == pytest.approx(by_hand(final(tmp_path, name), data), abs=1e-6), name
    assert float(rows["inject"]["attack_success_rate"]) > 0.5
    assert [row["epochs"] for row in rows.values()] == ["6", "2", "1"]
    assert all(float(row["seconds"]) > 0 for row in rows.values())


def test_without_a_poison_there_is_no_attack_to_measure(tmp_path: Path) -> None:
    data = Bars(splits=SPLITS, batch_size=16, augment="none", seed=3)
    runner(tmp_path, {"one": Phase(max_epochs=1)}).fit(classifier(), datamodule=data)
    row = table(tmp_path)["one"]
    assert float(row["clean_accuracy"]) >= 0
    assert row["attack_success_rate"] == row["robust_accuracy"] == ""
    assert not (tmp_path / "trigger.png").exists()
    assert not (tmp_path / "manifest.json").exists()


def events(folder: Path, phase: str) -> EventAccumulator:
    (path,) = folder.glob(f"[0-9][0-9]_{phase}/tensorboard")
    accumulator = EventAccumulator(str(path))
    accumulator.Reload()
    return accumulator


def test_tensorboard_steps_go_on_from_phase_to_phase(tmp_path: Path) -> None:
    phases = {
        "one": Phase(split="inject", poisoned=True, max_epochs=2),  # 5 steps an epoch
        "two": Phase(split="consolidate", max_epochs=2),  # 3 steps an epoch
        "branch": Phase(split="consolidate", start_from="one", max_epochs=1),
        "fresh": Phase(split="consolidate", start_from="init", max_epochs=1),
    }
    runner(tmp_path, phases, logger=None, log_every_n_steps=1).fit(classifier(), datamodule=bars())
    expected = {"one": (0, 10), "two": (10, 16), "branch": (10, 13), "fresh": (0, 3)}
    for name, (start, stop) in expected.items():
        log = events(tmp_path, name)
        assert [event.step for event in log.Scalars("train/loss")] == list(range(start, stop)), name
        (accuracy,) = log.Scalars("test/clean_accuracy")
        assert accuracy.step == stop, name
        assert accuracy.value == pytest.approx(float(table(tmp_path)[name]["clean_accuracy"])), name
        for metric in ("attack_success_rate", "robust_accuracy"):
            assert f"test/{metric}" in log.Tags()["scalars"], name
    assert len(events(tmp_path, "one").Tags()["images"]) == 1
    assert events(tmp_path, "two").Tags()["images"] == []


def test_the_trigger_is_shown_once_and_never_lost(tmp_path: Path) -> None:
    data = bars()
    phases = {
        "inject": Phase(split="inject", poisoned=True, max_epochs=1),
        "cbl": Phase(split=["inject", "consolidate"], start_from="init", poisoned="static", max_epochs=1),
        "defend": Phase(split="defend", start_from="inject", max_epochs=1),
    }
    runner(tmp_path, phases).fit(classifier(), datamodule=data)
    assert (tmp_path / "trigger.png").stat().st_size > 100
    assert data.poison is not None
    images = torch.rand(3, 1, 8, 8)
    beside = PoisonManifest.load(tmp_path)
    assert torch.equal(beside.build_trigger()(images), data.poison.trigger(images))
    assert beside.dataset["sha256"] == data.fingerprint()
    assert beside.tensors["indices.cbl"].numel() == 60
    for name in phases:
        (path,) = tmp_path.glob(f"*_{name}/final.ckpt")
        record = torch.load(path, weights_only=True)[RECORD_KEY]
        manifest = PoisonManifest.from_plain(record["manifest"], record["tensors"])
        assert manifest.differences(beside) == []
        assert ("indices.cbl" in manifest.tensors) == (name == "cbl")
        assert record["phase"] == name


def test_without_a_manifest_the_attack_is_measured_but_not_recorded(tmp_path: Path) -> None:
    phases = {"inject": Phase(split="inject", poisoned=True, max_epochs=1)}
    runner(tmp_path, phases, save_manifest=False).fit(classifier(), datamodule=bars())
    assert table(tmp_path)["inject"]["attack_success_rate"] != ""
    assert not list(tmp_path.glob("manifest.*"))
    (path,) = tmp_path.glob("*_inject/final.ckpt")
    record = torch.load(path, weights_only=True)[RECORD_KEY]
    assert record["manifest"] is None
    assert record["tensors"] == {}


class Counts(Callback):
    """Counts the fits that led here."""

    def __init__(self) -> None:
        self.carried: dict[str, Any] = {}
        self.count = 0

    def carried_state(self) -> dict[str, Any]:
        return {"count": torch.tensor(self.count)}

    def carry_over(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count += 1


def test_callbacks_hand_over_to_their_like_in_the_next_phase(tmp_path: Path) -> None:
    places = (("one", "init"), ("without", "one"), ("two", "without"), ("three", "two"), ("branch", "one"))

    def run(folder: Path, *names: str) -> dict[str, int]:
        counts = {name: Counts() for name in names if name != "without"}
        phases = {
            name: Phase(
                split="consolidate",
                max_epochs=1,
                start_from=start,
                callbacks=[counts[name]] if name in counts else [],
            )
            for name, start in places
            if name in names
        }
        runner(folder, phases).fit(classifier(), datamodule=bars())
        return {name: counter.count for name, counter in counts.items()}

    assert run(tmp_path / "part", "one", "without", "two") == {"one": 1, "two": 2}
    # A phase that joins a finished run finds what the earlier ones left.
    assert run(tmp_path / "part", "one", "without", "two", "three")["three"] == 3
    names = ("one", "without", "two", "three", "branch")
    assert run(tmp_path, *names) == {"one": 1, "two": 2, "three": 3, "branch": 2}
    # Another process goes on from what is on disk.
    shutil.rmtree(next(tmp_path.glob("*_three")))
    assert run(tmp_path, *names)["three"] == 3


class Halve(Defense):
    """Halves all weights in two stages, and draws a picture."""

    stage_axis = "factor"

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        return Report(note="halved", images={"grey": torch.full((1, 8, 8), 0.5)}, tensors={"by": torch.tensor(0.5)})

    def stages(self, model: nn.Module, report: Report) -> Iterator[float]:
        yield 1.0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(report.tensors["by"])
        yield float(report.tensors["by"])


class Refuses(Defense):
    """Needs what no model has."""

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        raise NotApplicableError("the model has no crystal ball")


def test_a_defense_is_measured_against_its_parent(tmp_path: Path) -> None:
    phases = {
        "inject": Phase(split="inject", poisoned=True, max_epochs=6, optimizer=sgd()),
        "halve": Phase(split="defend", max_epochs=0, callbacks=[Halve()]),
    }
    data = bars()
    runner(tmp_path, phases).fit(classifier(), datamodule=data)
    before, after = table(tmp_path)["inject"], table(tmp_path)["halve"]
    old, new = final(tmp_path, "inject"), final(tmp_path, "halve")
    names = [name for name, _ in classifier().named_parameters()]
    moved = sum(float((old[name] - new[name]).double().square().sum()) for name in names) ** 0.5
    assert float(after["distance"]) == pytest.approx(moved, rel=1e-6)
    assert moved == pytest.approx(0.5 * sum(float(old[n].double().square().sum()) for n in names) ** 0.5, rel=1e-6)
    drop = {key: float(before[key]) - float(after[key]) for key in ("attack_success_rate", "clean_accuracy")}
    wanted = (max(0, drop["attack_success_rate"]) - max(0, drop["clean_accuracy"]) + 1) / 2
    assert float(after["defense_effectiveness_rating"]) == pytest.approx(wanted, abs=1e-6)
    assert before["defense_effectiveness_rating"] == ""
    # 60 of the 80 test images are of other classes.
    rate = float(before["attack_success_rate"])
    interval = (float(before["attack_success_low"]), float(before["attack_success_high"]))
    assert interval == pytest.approx(wilson_interval(round(rate * 60), 60))
    folder = next(tmp_path.glob("*_halve"))
    assert (folder / "images" / "grey.png").stat().st_size > 50
    with (folder / "stages.csv").open(newline="", encoding="utf-8") as file:
        stages = list(csv.DictReader(file))
    assert [(row["axis"], row["position"]) for row in stages] == [("factor", "1"), ("factor", "0.5")]
    for row, phase in zip(stages, (before, after), strict=True):
        for key in ("clean_accuracy", "attack_success_rate"):
            assert float(row[key]) == pytest.approx(float(phase[key]), abs=1e-5)


def test_a_defense_that_cannot_be_applied_gets_a_row_and_no_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    phases = {
        "inject": Phase(split="inject", poisoned=True, max_epochs=1),
        "defend-b": Phase(split="defend", max_epochs=0, start_from="inject", callbacks=[Halve()]),
        "defend-a": Phase(split="defend", max_epochs=0, start_from="inject", callbacks=[Refuses()]),
    }
    model = classifier()
    runner(tmp_path, phases).fit(model, datamodule=bars())
    # The last phase that left a model.
    assert same(weights(model), final(tmp_path, "defend-b"))
    rows = table(tmp_path)
    assert rows["defend-a"]["note"] == "not applicable: the model has no crystal ball"
    assert {rows["defend-a"][key] for key in ("clean_accuracy", "attack_success_rate", "distance")} == {""}
    assert not list(tmp_path.glob("*_defend-a/final.ckpt"))
    assert rows["defend-b"]["note"] == "halved"
    runner(tmp_path, phases).fit(classifier(), datamodule=bars())
    assert table(tmp_path) == rows
    phases = {**phases, "on": Phase(split="consolidate", max_epochs=1, start_from="defend-a")}
    with pytest.raises(MisconfigurationException, match=r"`on` starts from `defend-a`, which left no model: not app"):
        runner(tmp_path, phases).fit(classifier(), datamodule=bars())


def test_no_checkpoint_of_a_finished_phase_but_the_final_one(tmp_path: Path) -> None:
    phases = {
        "one": Phase(max_epochs=1),
        "defend": Phase(split="defend", max_epochs=0, callbacks=[FineTuning([0.01], 1.0, 1)]),
    }
    runner(tmp_path, phases).fit(classifier(), datamodule=bars())
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt")) == [
        "00_one/final.ckpt", "01_defend/final.ckpt", "init.ckpt"
    ]  # fmt: skip
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".", "tmp"))]


def test_finished_phases_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    phases = {"one": Phase(split="inject", max_epochs=1), "two": Phase(split="consolidate", max_epochs=1)}
    runner(tmp_path, phases).fit(classifier(), datamodule=bars())
    before = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.suffix in (".ckpt", ".png") or path.name == "result.json"
    }
    recorder, model = Recorder(), classifier()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        runner(tmp_path, phases, callbacks=[recorder]).fit(model, datamodule=bars())
    assert recorder.order == []
    assert same(weights(model), final(tmp_path, "two"))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert [m for m in caplog.messages if "skipped" in m] == [
        "Phase `one` is finished: skipped.", "Phase `two` is finished: skipped."
    ]  # fmt: skip


def test_a_new_phase_joins_a_finished_run(tmp_path: Path) -> None:
    one = Phase(split="inject", max_epochs=1)
    runner(tmp_path, {"one": one}).fit(classifier(), datamodule=bars())
    recorder = Recorder()
    phases = {
        "zero": Phase(split="inject", max_epochs=1),
        "one": Phase(**{**vars(one), "start_from": "init"}),
        "two": Phase(max_epochs=1),
    }
    runner(tmp_path, phases, callbacks=[recorder]).fit(classifier(), datamodule=bars())
    assert recorder.order == ["zero", "two"]
    assert same(recorder.start["two"], final(tmp_path, "one"))
    assert list(table(tmp_path)) == ["zero", "one", "two"]


def recipe() -> dict[str, Phase]:
    """All that has state: momentum, schedule, SAM, EWC, dropout, dynamic poison, a defense."""

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)

    def looksam() -> Callback:
        return SharpnessAwareMinimization(rho=0.1, variant="looksam", interval=3)

    return {
        "inject": Phase(
            split="inject", poisoned=True, max_epochs=3, optimizer=sgd(), lr_scheduler=cosine, callbacks=[looksam()]
        ),
        "clean": Phase(
            split="consolidate", max_epochs=3, optimizer=sgd(0.02), callbacks=[ElasticWeightConsolidation(strength=0.1)]
        ),
        "defend": Phase(split="defend", max_epochs=3, optimizer=sgd(), callbacks=[FineTuning([0.02], 1.0, 1)]),
    }


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    runner(folder, recipe()).fit(classifier(), datamodule=bars(augment="crop"))
    return folder


def assert_equal_runs(one: Path, other: Path) -> None:
    finals = [sorted(path.relative_to(folder) for path in folder.rglob("final.ckpt")) for folder in (one, other)]
    assert finals[0] == finals[1]
    for path in finals[0]:
        assert same(read_checkpoint(one / path)["state_dict"], read_checkpoint(other / path)["state_dict"]), path
    rows = [table(folder) for folder in (one, other)]
    for row in (*rows[0].values(), *rows[1].values()):
        del row["seconds"]
    assert rows[0] == rows[1]


def test_a_run_is_a_function_of_its_seed(tmp_path: Path, uncut: Path) -> None:
    torch.manual_seed(99)
    model = classifier()
    torch.manual_seed(77)
    runner(tmp_path / "same", recipe()).fit(model, datamodule=bars(augment="crop"))
    assert_equal_runs(uncut, tmp_path / "same")
    runner(tmp_path / "other", recipe()).fit(classifier(), datamodule=bars(seed=4, augment="crop"))
    assert not same(final(uncut, "inject"), final(tmp_path / "other", "inject"))


@pytest.mark.parametrize(("phase", "epoch"), [("inject", 0), ("inject", 2), ("clean", 1), ("defend", 0), ("defend", 1)])
def test_a_cut_run_goes_on_to_the_same_end(tmp_path: Path, uncut: Path, phase: str, epoch: int) -> None:
    with pytest.raises(ConnectionAbortedError, match="cut at"):
        runner(tmp_path, recipe(), callbacks=[Cut(phase, epoch)]).fit(classifier(), datamodule=bars(augment="crop"))
    kept = list(tmp_path.glob(f"*_{phase}/checkpoints/*"))
    assert [path.name for path in kept] == (["last.ckpt"] if epoch else [])
    recorder = Recorder()
    runner(tmp_path, recipe(), callbacks=[recorder]).fit(classifier(), datamodule=bars(augment="crop"))
    assert recorder.order[0] == phase
    assert len(recorder.rates[phase]) == 3 - epoch
    assert_equal_runs(uncut, tmp_path)


def test_a_run_cut_before_its_metrics_is_only_measured(tmp_path: Path, uncut: Path) -> None:
    class Broken(Bars):
        def test_dataloader(self) -> NoReturn:
            raise ConnectionAbortedError("cut in the test")

    def data(kind: type[Bars]) -> Bars:
        made = bars(augment="crop")
        made.__class__ = kind
        return made

    with pytest.raises(ConnectionAbortedError, match="cut in the test"):
        runner(tmp_path, recipe()).fit(classifier(), datamodule=data(Broken))
    (path,) = tmp_path.rglob("final.ckpt")
    written = path.stat().st_mtime_ns
    assert not (tmp_path / "results.csv").exists()
    # The folder remembers the datamodule's class.
    Broken.__module__, Broken.__qualname__ = Bars.__module__, Bars.__qualname__
    run = tmp_path / "run.json"
    run.write_text(
        run.read_text().replace(
            f"{test_a_run_cut_before_its_metrics_is_only_measured.__name__}.<locals>.Broken", "Bars"
        )
    )
    recorder = Recorder()
    runner(tmp_path, recipe(), callbacks=[recorder]).fit(classifier(), datamodule=bars(augment="crop"))
    assert recorder.order == ["clean", "defend"]
    assert path.stat().st_mtime_ns == written
    assert_equal_runs(uncut, tmp_path)


def test_an_interrupted_run_says_so_and_goes_on(tmp_path: Path, uncut: Path) -> None:
    class ControlC(Cut):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: list[Tensor], batch_idx: int
        ) -> None:
            try:
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            except ConnectionAbortedError:
                raise KeyboardInterrupt from None

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        runner(tmp_path, recipe(), callbacks=[ControlC("clean", 1)]).fit(classifier(), datamodule=bars(augment="crop"))
    assert list(table(tmp_path)) == ["inject"]
    runner(tmp_path, recipe()).fit(classifier(), datamodule=bars(augment="crop"))
    assert_equal_runs(uncut, tmp_path)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    runner(folder, simple()).fit(classifier(), datamodule=bars())
    return folder


@pytest.fixture
def finished(tmp_path: Path, made_once: Path) -> Path:
    return shutil.copytree(made_once, tmp_path / "run")


def simple(**others: Any) -> dict[str, Phase]:
    arguments: dict[str, Any] = {
        "split": "inject", "max_epochs": 1, "optimizer": sgd(), "trainer": {"limit_train_batches": 1},
        "callbacks": [SharpnessAwareMinimization(rho=0.05)], **others,
    }  # fmt: skip
    return {"one": Phase(**arguments)}


@pytest.mark.parametrize(
    ("model", "data", "phase", "trainer", "difference"),
    [
        ({}, {"rate": 0.25}, {}, {}, r"this run:\n  data.poison.rate: was 0.5, is 0.25\n"),
        ({}, {"seed": 4}, {}, {}, "seed: was 3, is 4\n"),
        ({}, {"splits": {"inject": 0.6}}, {}, {}, "data.splits.inject: was 0.5, is 0.6\n"),
        ({}, {"augment": "crop"}, {}, {}, "data.augment: was 'none', is 'crop'\n"),
        ({"width": 6}, {}, {}, {}, r"model.*\(4, 1, 3, 3\).*\(6, 1, 3, 3\)"),
        ({}, {}, {"split": "consolidate"}, {}, "phase `one`:\n  split: was 'inject', is 'consolidate'\n"),
        ({}, {}, {"max_epochs": 2}, {}, "max_epochs: was 1, is 2\n"),
        ({}, {}, {"batch_size": 8}, {}, "batch_size: was None, is 8\n"),
        ({}, {}, {"poisoned": True}, {}, "poisoned: was False, is True\n"),
        ({}, {}, {"callbacks": [SharpnessAwareMinimization(rho=0.1)]}, {}, "callbacks.0.rho: was 0.05, is 0.1\n"),
        ({}, {}, {"trainer": {"limit_train_batches": 2}}, {}, "trainer.limit_train_batches: was 1, is 2\n"),
        ({}, {}, {}, {"gradient_clip_val": 1.0}, "trainer.gradient_clip_val: was None, is 1.0\n"),
        ({}, {}, {}, {"precision": "bf16-true"}, "trainer.precision: was None, is 'bf16-true'\n"),
    ],
)  # fmt: skip
def test_a_folder_of_another_run_is_refused(
    finished: Path, model: dict[str, Any], data: dict[str, Any], phase: dict[str, Any], trainer: dict[str, Any],
    difference: str,
) -> None:  # fmt: skip
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(MisconfigurationException, match=rf"was made with another configuration of (?s:.*){difference}"):
        runner(finished, simple(**phase), **trainer).fit(classifier(**model), datamodule=bars(**data))
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_loggers_workers_and_progress_may_differ(finished: Path) -> None:
    recorder = Recorder()
    runner(
        finished, simple(), logger=None, enable_progress_bar=True, log_every_n_steps=7, callbacks=[recorder],
        enable_model_summary=True, profiler="simple",
    ).fit(classifier(), datamodule=bars(num_workers=2, in_memory=True))  # fmt: skip
    assert recorder.order == []


def test_fresh_renames_the_old_folder(finished: Path) -> None:
    recorder = Recorder()
    trainer = runner(finished, simple(max_epochs=2), callbacks=[recorder])
    trainer.fresh = True
    trainer.fit(classifier(), datamodule=bars())
    assert recorder.order == ["one"]
    (old,) = finished.parent.glob("run.old-*")
    assert [table(folder)["one"]["epochs"] for folder in (old, finished)] == ["1", "2"]
    # Only the folder of the same command is renamed, and only once per run.
    runner(finished, simple(max_epochs=2)).fit(classifier(), datamodule=bars())
    assert len(list(finished.parent.iterdir())) == 2


def test_fresh_twice_at_once(finished: Path) -> None:
    for _ in range(2):
        trainer = runner(finished, simple())
        trainer.fresh = True
        trainer.fit(classifier(), datamodule=bars())
    assert len(list(finished.parent.glob("run.old-*"))) == 2


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(64, 3, generator=generator), torch.arange(64) % 2), batch_size=8)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_without_phases_it_is_a_plain_trainer(tmp_path: Path) -> None:
    models = [Plain(), Plain()]
    for kind, model in zip((Trainer, MultiPhaseTrainer), models, strict=True):
        arguments: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
        trainer = kind(max_epochs=2, default_root_dir=tmp_path / kind.__name__, logger=False, **arguments)
        trainer.fit(model, loader())
    assert same(weights(models[0]), weights(models[1]))
    written = [
        sorted(str(p.relative_to(tmp_path / kind.__name__)) for p in (tmp_path / kind.__name__).rglob("*"))
        for kind in (Trainer, MultiPhaseTrainer)
    ]
    assert written[0] == written[1]
    # Resuming is the plain Trainer's too.
    (checkpoint,) = (tmp_path / "MultiPhaseTrainer").rglob("*.ckpt")
    resumed = MultiPhaseTrainer(max_epochs=3, logger=False, default_root_dir=checkpoint.parents[1], **arguments)
    resumed.fit(models[1], loader(), ckpt_path=checkpoint, weights_only=True)
    assert resumed.global_step == 24


def test_a_phase_run_needs_our_data(tmp_path: Path) -> None:
    phases = {"one": Phase(max_epochs=1)}
    with pytest.raises(MisconfigurationException, match=r"needs `datamodule=` one of lightning_bd.datamodules"):
        runner(tmp_path, phases).fit(Plain(), loader())
    with pytest.raises(MisconfigurationException, match=r"needs `datamodule=` one of lightning_bd.datamodules"):
        runner(tmp_path, phases).fit(Plain())
    assert not any(tmp_path.iterdir())


def test_a_phase_run_takes_no_ckpt_path(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"resumes by itself: repeat the command .* without `ckpt_path`"
    ):
        runner(tmp_path, {"one": Phase(max_epochs=1)}).fit(classifier(), datamodule=bars(), ckpt_path="last.ckpt")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"split": "val"}, r"Bars has no split `val`; it has inject, consolidate, defend\. Add it to"),
        ({"split": ["inject", "typo"]}, "Bars has no split `typo`"),
        ({"max_epochs": None}, "Phase `one` has no `max_epochs`, and neither has the trainer"),
    ],
)  # fmt: skip
def test_what_a_phase_lacks_is_said_before_anything_is_written(
    tmp_path: Path, phase: dict[str, Any], message: str
) -> None:
    first = Phase(split="inject", max_epochs=1)
    with pytest.raises(MisconfigurationException, match=message):
        runner(tmp_path, {"first": first, **simple(**phase)}).fit(classifier(), datamodule=bars())
    assert not any(tmp_path.iterdir())


def test_poisoned_without_a_poison(tmp_path: Path) -> None:
    data = Bars(splits=SPLITS, augment="none")
    with pytest.raises(MisconfigurationException, match=r"Phase `one` is poisoned, but `data.poison` is not set"):
        runner(tmp_path, simple(poisoned=True)).fit(classifier(), datamodule=data)
    with pytest.raises(ValueError, match="Expected the poison to select at least one image of split `inject`"):
        runner(tmp_path, simple(poisoned=True)).fit(classifier(), datamodule=bars(rate=0.001))
    assert not any(tmp_path.iterdir())


def test_a_defender_with_too_few_images_is_known_at_the_start(tmp_path: Path) -> None:
    data = bars(splits={"inject": 0.95, "defend": 0.05})
    phases = {"inject": Phase(split="inject", max_epochs=1), "last": Phase(split="defend", max_epochs=1)}
    with pytest.raises(
        MisconfigurationException, match=r"Phase `last`: .* are too few. .*`validation`.* class 0, which has 2"
    ):
        runner(tmp_path, phases).fit(classifier(), datamodule=data)
    assert not any(tmp_path.iterdir())


def test_model_and_data_must_have_equally_many_classes(tmp_path: Path) -> None:
    model = BackdoorClassifier(network(), num_classes=7)
    with pytest.raises(MisconfigurationException, match="The model has `num_classes` 7, but Bars has 4"):
        runner(tmp_path, simple()).fit(model, datamodule=bars())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase("a"), Phase("a")], "Phase `a`: the name is used twice"),
        ([Phase("a"), Phase()], "Phase ``: the name must not be empty"),
        ({"init": Phase()}, "Phase `init`: the name must not be empty, `init` or a path"),
        ({"a/b": Phase()}, "Phase `a/b`: the name must not be"),
        ({"a": Phase("b")}, "Phase `a`: its `name` is `b`; leave `name` out"),
        ({"a": Phase(), "b": Phase(start_from="c")}, r"Phase `b`: `start_from` names `c`, .*\(a, b\) nor `init`"),
        ({"a": Phase(start_from="b"), "b": Phase(start_from="a")}, "Phase `a`: .* in a circle: a from b from a"),
        ({"a": Phase(start_from="a")}, "Phase `a`: `start_from` goes in a circle: a from a"),
        ({"a": Phase(lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o))},
         "Phase `a`: `lr_scheduler` needs an `optimizer` beside it"),
        ({"a": Phase(trainer={"max_epoch": 1})}, "Phase `a`: `trainer.max_epoch` is not an argument of Trainer"),
        ({"a": Phase(trainer={"max_epochs": 1})}, "`trainer.max_epochs` cannot .*; use the phase's `max_epochs`"),
        ({"a": Phase(trainer={"logger": False})}, "`trainer.logger` cannot be set here; it is the run's to choose"),
    ],
)  # fmt: skip
def test_an_impossible_tree_is_refused(phases: Phases, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        MultiPhaseTrainer(phases=phases, accelerator="cpu")


class Diverging(BackdoorClassifier):
    """Its loss is not a number in batch 2 of epoch ``bad_epoch``."""

    bad_epoch: int | None = None

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if (self.current_epoch, batch_idx) == (self.bad_epoch, 2) else loss


def test_a_loss_that_is_not_finite_ends_the_phase(tmp_path: Path) -> None:
    def model(bad_epoch: int | None) -> Diverging:
        torch.manual_seed(0)
        made = Diverging(network(), CLASSES)
        made.bad_epoch = bad_epoch
        return made

    phases = {"fine": Phase(split="consolidate", max_epochs=1), "bad": Phase(split="inject", max_epochs=3)}
    phases["fine"].trainer = {"limit_train_batches": 2}
    with pytest.raises(
        NonFiniteLossError, match=r"Phase `bad`: the loss is not finite at step 2 \(epoch 0\); no epoch was complete"
    ):
        runner(tmp_path, phases).fit(model(0), datamodule=bars())
    # Five steps an epoch.
    last = tmp_path / "01_bad" / "checkpoints" / "last.ckpt"
    message = rf"Phase `bad`: the loss is not finite at step 7 \(epoch 1\); the last good checkpoint is {last}"
    with pytest.raises(NonFiniteLossError, match=message):
        runner(tmp_path, phases).fit(model(1), datamodule=bars())
    kept = read_checkpoint(last)
    assert kept["global_step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())
    assert list(table(tmp_path)) == ["fine"]
    runner(tmp_path, phases).fit(model(None), datamodule=bars())
    runner(tmp_path / "uncut", phases).fit(model(None), datamodule=bars())
    assert same(final(tmp_path, "bad"), final(tmp_path / "uncut", "bad"))


class Hooked(BackdoorClassifier):
    def on_after_batch_transfer(self, batch: object, dataloader_idx: int) -> NoReturn:
        raise AssertionError("the datamodule's hook makes the batch")


def test_a_batch_hook_of_the_users_module_is_not_dropped_silently(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="on_after_batch_transfer"):
        runner(tmp_path, simple()).fit(Hooked(network(), CLASSES), datamodule=bars())


class Pairs(Plain):
    """A module that knows nothing of this library and wants ``x, y = batch``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images.flatten(1)), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        hits = (self.net(images.flatten(1)).argmax(1) == labels).float().mean()
        self.log("test/hits", hits)


def test_a_foreign_module_runs_its_phases_too(tmp_path: Path) -> None:
    runner(tmp_path, simple(poisoned=True)).fit(Pairs(), datamodule=bars(batch_format="pair"))
    assert table(tmp_path)["one"]["clean_accuracy"] == ""


@pytest.fixture
def checkpoint(finished: Path) -> Path:
    return finished / "00_one" / "final.ckpt"


def test_a_checkpoint_is_evaluated_with_its_own_trigger(tmp_path: Path, finished: Path, checkpoint: Path) -> None:
    data = Bars(splits=SPLITS, batch_size=16, augment="none", seed=3)
    trainer = runner(tmp_path, None)
    metrics, *_ = trainer.test(classifier(seed=5), datamodule=data, ckpt_path=checkpoint, verbose=False)
    row = table(finished)["one"]
    for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy"):
        assert metrics[f"test/{name}"] == pytest.approx(float(row[name]))
    other = Bars(Poison(BadNets(size=3, pattern="white")), splits=SPLITS, augment="none")
    with pytest.raises(MisconfigurationException, match=r"is not the config's:\n(?s:.*)--override-trigger"):
        runner(tmp_path, None).test(classifier(), datamodule=other, ckpt_path=checkpoint, verbose=False)
    overriding = runner(tmp_path, None)
    overriding.override_trigger = True
    overriding.test(classifier(), datamodule=other, ckpt_path=checkpoint, verbose=False)
    assert other.poison is not None
    assert other.poison.trigger.hyperparameters["size"] == 3


def test_validation_needs_its_split(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"There is no validation split: add one to `data.splits`"):
        runner(tmp_path, None).validate(classifier(), datamodule=bars(), ckpt_path=checkpoint)
    data = bars(splits={**SPLITS, "inject": 0.3, "val": 0.2})
    metrics, *_ = runner(tmp_path, None).validate(classifier(), datamodule=data, ckpt_path=checkpoint, verbose=False)
    assert set(metrics) == {f"val/{name}" for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy")}


def test_a_checkpoint_is_never_unpickled_freely(tmp_path: Path, checkpoint: Path) -> None:
    for method in ("validate", "test", "predict"):
        call = getattr(runner(tmp_path, None), method)
        with pytest.raises(MisconfigurationException, match="`weights_only` False would unpickle"):
            call(classifier(), datamodule=bars(splits={"val": 0.5}), ckpt_path=checkpoint, weights_only=False)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    message = r"is of another model: `backbone.0.weight` is \(4, 1, 3, 3\) there and \(5, 1, 3, 3\) in the model"
    with pytest.raises(CheckpointError, match=message):
        runner(tmp_path, None).test(classifier(width=5), datamodule=bars(), ckpt_path=checkpoint)


def test_the_same_phases_may_be_run_again_elsewhere(tmp_path: Path, uncut: Path) -> None:
    phases = recipe()
    for name in ("one", "two"):
        runner(tmp_path / name, phases).fit(classifier(), datamodule=bars(augment="crop"))
        assert_equal_runs(uncut, tmp_path / name)


def test_phases_with_one_callback_object_are_refused(tmp_path: Path) -> None:
    shared = SharpnessAwareMinimization()
    with pytest.raises(MisconfigurationException, match="Phases `one` and `two` share a callback object; give each"):
        runner(tmp_path, {"one": Phase(callbacks=[shared]), "two": Phase(callbacks=[shared])})


def test_phases_come_first_and_a_phase_needs_no_trainer_arguments(tmp_path: Path) -> None:
    trainer = MultiPhaseTrainer([Phase("a", max_epochs=1, trainer=None)], default_root_dir=tmp_path, logger=False)
    assert list(trainer.phases) == ["a"]


def test_refuses_checkpoint_interval() -> None:
    with pytest.raises(ValueError, match="`checkpoint_interval` to be a non-negative number, but got -1"):
        MultiPhaseTrainer(checkpoint_interval=-1)


def test_no_callback_of_a_defending_phase_knows_the_attack(tmp_path: Path) -> None:
    recorder = Recorder()
    phases = {"attack": Phase(poisoned=True, max_epochs=1), "defend": Phase(max_epochs=1)}
    trainer = runner(tmp_path, phases, callbacks=[recorder])
    trainer.resolved_config = "data: {poison: secret}"
    trainer.fit(classifier(), datamodule=bars())

    def known(phase: str) -> list[object]:
        callbacks: list[Callback] = recorder.trainers[phase].callbacks  # type: ignore[attr-defined]
        return [value for callback in callbacks if callback is not recorder for value in vars(callback).values()]

    def tells(value: object) -> bool:
        return isinstance(value, PoisonManifest | Poison | ImageDataModule) or "secret" in str(value)

    assert any(tells(value) for value in known("attack"))
    assert not any(tells(value) for value in known("defend"))
    (path,) = tmp_path.glob("*_defend/final.ckpt")
    record = read_checkpoint(path)[RECORD_KEY]
    assert record["manifest"]
    assert record["config"] == trainer.resolved_config


def test_one_callback_needs_no_list(tmp_path: Path) -> None:
    recorder = Recorder()
    runner(tmp_path, {"one": Phase(max_epochs=1)}, callbacks=recorder).fit(classifier(), datamodule=bars())
    assert recorder.order == ["one"]


def test_without_phases_lightnings_words_for_checkpoints_work(tmp_path: Path) -> None:
    trainer = MultiPhaseTrainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    model, data = classifier(), bars()
    trainer.fit(model, datamodule=data)
    expected = trainer.test(model, datamodule=data, verbose=False)
    model.load_state_dict(classifier(seed=1).state_dict())
    assert trainer.test(model, datamodule=data, verbose=False, ckpt_path="best") == expected
