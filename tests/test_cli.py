"""The command line as a user meets it: what it prints, writes, refuses and how it leaves."""

import csv
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bd.checkpointing import RECORD_KEY
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.cli import BackdoorCLI, main
from lightning_bd.config_files import shipped_configs
from lightning_bd.manifest import PoisonManifest

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("workplace")


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return {row["phase"]: row for row in csv.DictReader(file)}


def resolved(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return config


def printed(out: str) -> dict[str, float]:
    """Read the table that an evaluation prints."""
    return {name: float(value) for name, value in re.findall(r"((?:test|val)/\w+) +│ +([\d.]+)", out)}


def test_the_runs_description_says_nothing_of_the_command_line(trained: Path) -> None:
    """Else a new release of the parser, or of this file, would make another run of the same one."""
    for file in (trained / "run.json", trained / "00_inject" / "phase.json"):
        text = file.read_text()
        assert "torch.optim.sgd.SGD" in text
        for word in ("jsonargparse", "CLI", "instantiator"):
            assert word not in text, word


def test_only_the_typed_commands_options_are_made(lightning_bd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """All twelve commands' took longer than the rest of the parsing."""
    made: list[str] = []
    add = BackdoorCLI.add_core_arguments_to_parser

    def count(self: BackdoorCLI, parser: LightningArgumentParser) -> None:
        made.append(str(parser.description))
        add(self, parser)

    monkeypatch.setattr(BackdoorCLI, "add_core_arguments_to_parser", count)
    assert lightning_bd("fit", "--config", "small.yaml", "--print_config").status == 0
    assert len(made) == 1
    assert made[0].startswith("Run every phase")
    made.clear()
    assert lightning_bd("--help").status == 0
    assert len(made) == len(BackdoorCLI.subcommands())


def test_fit_writes_the_run_and_prints_the_table(lightning_bd: Command, tmp_path: Path) -> None:
    done = lightning_bd("fit", "--config", "small.yaml")
    run = tmp_path / "runs" / "small"
    assert done.status == 0
    assert {path.name for path in run.iterdir()} == {
        "00_inject", "01_consolidate", "config.yaml", "init.ckpt", "manifest.json", "manifest.safetensors",
        "results.csv", "run.json", "trigger.png",
    }  # fmt: skip
    for name, row in rows(run).items():
        shown = rf"{name} .* {100 * float(row['clean_accuracy']):.1f} .* {100 * float(row['attack_success_rate']):.1f}"
        assert re.search(shown, done.out), name
    for column in ("phase", "clean acc. %", "ASR %", "robust acc. %", "epochs", "seconds"):
        assert column in done.out
    assert "runs/small" in done.out
    # What was run can be run again from what was saved.
    assert lightning_bd("fit", "--config", run / "config.yaml", f"--trainer.default_root_dir={run}").status == 0


class OwnClassifier(BackdoorClassifier):
    """Counts its steps."""

    steps = 0

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        type(self).steps += 1
        return super().training_step(batch, batch_idx)


def test_a_config_names_the_models_class(
    lightning_bd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("own_module")
    monkeypatch.setattr(OwnClassifier, "__module__", "own_module")
    monkeypatch.setattr(OwnClassifier, "steps", 0)
    module.OwnClassifier = OwnClassifier  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_module", module)
    Path("own.yaml").write_text("model: {class_path: own_module.OwnClassifier, init_args: {channels_last: true}}\n")
    assert lightning_bd("fit", "--config", "small.yaml", "--config", "own.yaml", "--trainer.max_epochs=1").status == 0
    assert OwnClassifier.steps > 0
    # What was run can be run again from what was saved, also with an option of the command line.
    run = tmp_path / "runs" / "small"
    assert resolved(run)["model"]["class_path"] == "own_module.OwnClassifier"
    assert resolved(run)["model"]["init_args"]["channels_last"] is True
    again = lightning_bd(
        "fit", "--config", run / "config.yaml", "--model.channels_last=false", "--trainer.max_epochs=1"
    )
    again.check_refused(["channels_last"])
    assert lightning_bd("fit", "--config", "small.yaml", "--trainer.max_epochs=1").status == 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nosuch.Thing", ["nosuch.Thing", "No module named"]),
        ("lightning_bd.triggers.SIG", ["LightningModule", "is none"]),
    ],
)
def test_an_unknown_class_of_the_model_is_refused(lightning_bd: Command, path: str, words: list[str]) -> None:
    Path("own.yaml").write_text(f"model: {{class_path: {path}}}\n")
    lightning_bd("fit", "--config", "small.yaml", "--config", "own.yaml").check_refused(words)


@pytest.mark.parametrize(
    ("options", "epochs", "rate"),
    [
        (["--trainer.max_epochs", "1"], ["1", "1"], 0.1),
        (["--trainer.phases.inject.max_epochs", "1", "--data.poison.rate", "0.05"], ["1", "1"], 0.05),
        (["--trainer.phases.consolidate.max_epochs=2"], ["2", "2"], 0.1),
    ],
)
def test_options_override_the_config(
    lightning_bd: Command, tmp_path: Path, options: list[str], epochs: list[str], rate: float
) -> None:
    assert lightning_bd("fit", "--config", "small.yaml", *options).status == 0
    run = tmp_path / "runs" / "small"
    assert [row["epochs"] for row in rows(run).values()] == epochs
    assert PoisonManifest.load(run).rate == rate
    assert resolved(run)["data"]["init_args"]["poison"]["rate"] == rate


def test_a_second_config_merges_by_the_names_of_phases(lightning_bd: Command, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        "trainer: {phases: {inject: {max_epochs: 1}, tail: {start_from: inject, split: defend, max_epochs: 1}}}"
    )
    assert lightning_bd("fit", "--config", "small.yaml", "-c", "more.yaml").status == 0
    run = tmp_path / "runs" / "small"
    assert {name: (row["start_from"], row["epochs"]) for name, row in rows(run).items()} == {
        "inject": ("init", "1"), "consolidate": ("inject", "1"), "tail": ("inject", "1")
    }  # fmt: skip
    assert resolved(run)["trainer"]["phases"]["inject"]["split"] == "inject"


@pytest.mark.slow
def test_the_seed_is_the_runs(lightning_bd: Command, tmp_path: Path) -> None:
    def weights(folder: str) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(tmp_path / folder / "00_inject/final.ckpt")["state_dict"]
        return state

    command = ["fit", "--config", "small.yaml", "--trainer.max_epochs=1"]
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(folder))
        done = lightning_bd(*command, f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}")
        assert done.status == 0
    assert all(torch.equal(tensor, weights("b")[name]) for name, tensor in weights("a").items())
    assert not all(torch.equal(tensor, weights("c")[name]) for name, tensor in weights("a").items())


def test_fresh_starts_over(lightning_bd: Command, tmp_path: Path) -> None:
    command = ["fit", "--config", "small.yaml", "--trainer.max_epochs=1"]
    assert lightning_bd(*command).status == 0
    refused = lightning_bd(*command, "--data.poison.rate=0.2")
    assert refused.status == 2
    assert "was made with another configuration" in refused.err
    assert "data.poison.rate: was 0.1, is 0.2" in refused.err
    assert "--fresh" in refused.err
    assert rows(tmp_path / "runs" / "small")["inject"]["epochs"] == "1"
    assert lightning_bd(*command, "--data.poison.rate=0.2", "--fresh").status == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders[0] == "small"
    assert re.fullmatch(r"small\.old-\d{8}-\d{6}", folders[1])
    assert PoisonManifest.load(tmp_path / "runs" / "small").rate == 0.2


@pytest.mark.parametrize("phase", ["inject", "consolidate"])
def test_test_prints_what_the_run_measured(lightning_bd: Command, trained: Path, phase: str) -> None:
    (checkpoint,) = trained.glob(f"*_{phase}/final.ckpt")
    done = lightning_bd("test", "--config", "small.yaml", "--ckpt_path", checkpoint)
    assert done.status == 0
    row = rows(trained)[phase]
    names = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
    assert printed(done.out) == {f"test/{name}": pytest.approx(100 * float(row[name]), abs=0.006) for name in names}
    assert not Path("runs").exists()


def test_the_checkpoints_trigger_is_used_where_the_config_has_none(
    lightning_bd: Command, trained: Path, tmp_path: Path
) -> None:
    clean = yaml.safe_load((trained.parent / "small.yaml").read_text())
    del clean["data"]["init_args"]["poison"]
    (tmp_path / "clean.yaml").write_text(yaml.safe_dump(clean))
    done = lightning_bd("test", "--config", "clean.yaml", "--ckpt_path", trained / "00_inject" / "final.ckpt")
    success = 100 * float(rows(trained)["inject"]["attack_success_rate"])
    assert printed(done.out)["test/attack_success_rate"] == pytest.approx(success, abs=0.006)


def test_another_trigger_needs_the_users_word(lightning_bd: Command, trained: Path) -> None:
    command = ["test", "--config", "small.yaml", "--ckpt_path", trained / "00_inject" / "final.ckpt"]
    other = "--data.poison.trigger.init_args.size=3"
    refused = lightning_bd(*command, other)
    assert refused.status == 2
    assert "is not the config's" in refused.err
    assert "--override-trigger" in refused.err
    for flag in ("--override-trigger", "--override_trigger"):
        assert lightning_bd(*command, other, flag).status == 0


def test_the_checkpoint_never_overrides_the_command_line(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    # What `save_hyperparameters` of some other module would have left, where Lightning looks.
    checkpoint = torch.load(trained / "00_inject" / "final.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"num_classes": 3, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save(checkpoint, tmp_path / "hyper.ckpt")
    done = lightning_bd("test", "--config", "small.yaml", "--ckpt_path", "hyper.ckpt")
    assert done.status == 0
    accuracy = 100 * float(rows(trained)["inject"]["clean_accuracy"])
    assert printed(done.out)["test/clean_accuracy"] == pytest.approx(accuracy, abs=0.006)
    assert "hyper_parameters" not in torch.load(trained / "00_inject" / "final.ckpt", weights_only=True)


def test_predict_writes_a_table(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "00_inject" / "final.ckpt"
    assert lightning_bd("predict", "--config", "small.yaml", "--ckpt_path", checkpoint).status == 0
    with (tmp_path / "runs" / "small" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        predictions = list(csv.DictReader(file))
    assert list(predictions[0]) == ["index", "label", "prediction", "confidence"]
    assert len(predictions) == 359  # the held-out digits
    right = sum(row["label"] == row["prediction"] for row in predictions) / len(predictions)
    assert right == pytest.approx(float(rows(trained)["inject"]["clean_accuracy"]), abs=1e-6)
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in predictions)


def test_validate_needs_a_split(lightning_bd: Command, trained: Path) -> None:
    command = ["validate", "--config", "small.yaml", "--ckpt_path", trained / "00_inject" / "final.ckpt"]
    refused = lightning_bd(*command)
    assert refused.status == 2
    assert "There is no validation split: add one to `data.splits` (`val: 0.05`)" in refused.err
    done = lightning_bd(*command, "--data.splits", "{inject: 0.6, val: 0.2, consolidate: 0.1, defend: 0.1}")
    assert done.status == 0
    assert set(printed(done.out)) == {f"val/{n}" for n in ("clean_accuracy", "attack_success_rate", "robust_accuracy")}


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.mark.parametrize("place", ["file", "state_dict", "record"])
@pytest.mark.parametrize("subcommand", ["test", "predict"])
def test_a_checkpoint_that_wants_to_run_code_is_refused(
    lightning_bd: Command, trained: Path, tmp_path: Path, place: str, subcommand: str
) -> None:
    marker, file = tmp_path / "ran", tmp_path / "malicious.ckpt"
    checkpoint = torch.load(trained / "00_inject" / "final.ckpt", weights_only=True)
    bomb = Malicious(marker)
    if place == "file":
        file.write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        checkpoint[place if place == "state_dict" else RECORD_KEY]["extra"] = bomb
        torch.save(checkpoint, file)
    # The bomb works.
    torch.load(file, weights_only=False) if place != "file" else pickle.loads(file.read_bytes())
    assert marker.exists()
    marker.unlink()
    refused = lightning_bd(subcommand, "--config", "small.yaml", "--ckpt_path", file)
    assert refused.status == 2
    assert not marker.exists()
    assert "malicious.ckpt" in refused.err
    assert "Nothing was executed" in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.parametrize(
    ("subcommand", "wanted"),
    [
        (
            "fit",
            ["Run every phase, skipping finished ones", "trainer.phases", "Name -> phase", "--fresh", "Start over"],
        ),
        ("validate", ["Evaluate on the split `val`", "--ckpt_path", "its own trigger is used"]),
        ("test", ["Evaluate on the test set", "--ckpt_path", "--override_trigger, --override-trigger"]),
        ("predict", ["Predict the clean test set and write `predictions.csv`", "--ckpt_path"]),
    ],
)
def test_help_explains_the_options(lightning_bd: Command, subcommand: str, wanted: list[str]) -> None:
    done = lightning_bd(subcommand, "--help")
    assert done.status == 0
    text = " ".join(done.out.split())
    everywhere = ["--model.backbone", "Any module that maps images", "--trainer.max_epochs", "--trainer.num_threads",
                  "Threads per process", "A shipped config's name or the path of a YAML file"]  # fmt: skip
    for words in [*wanted, *everywhere]:
        assert words in text, words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lightning_bd.datamodules.DigitsDataModule", ["--data.poison", "--data.splits", "Share of the training set"]),
        ("lightning_bd.datamodules.CIFAR10DataModule", ["--data.root", "Folder that holds the data set"]),
    ],
)
def test_help_of_a_datamodule(lightning_bd: Command, name: str, words: list[str]) -> None:
    done = lightning_bd("fit", "--data.help", name)
    assert done.status == 0
    text = " ".join(done.out.split())
    for word in words:
        assert word in text


CIFAR = ["--data", "lightning_bd.datamodules.CIFAR10DataModule", "--data.root", "nowhere"]
BAD: dict[str, tuple[list[str], list[str]]] = {
    "typo in an option": (["--trainer.max_epohcs", "1"], ["max_epohcs"]),
    "abbreviation": (["--trainer.max_epoch", "1"], ["max_epoch"]),
    "typo in a data option": (["--data.subste", "1"], ["subste"]),
    "typo in a trigger's option": (["--data.poison.trigger.init_args.sise", "1"], ["sise"]),
    "typo in a backbone's option": (["--model.backbone.init_args.widht", "3"], ["widht"]),
    "text for a number": (["--trainer.max_epochs", "one"], ["trainer.max_epochs", "int"]),
    "unknown class": (["--model.backbone", "lightning_bd.backbones.resnet19"], ["resnet19"]),
    "missing dataset": (CIFAR, ["CIFAR10DataModule", "nowhere/cifar-10-batches-py", "--data.root", "download"]),
    "poison rate": (["--data.poison.rate", "2"], ["`rate`", "[0, 1]", "2.0"]),
    "poison of nothing": (["--data.poison.rate", "0.0001"], ["`inject`", "rate 0.0001", "selects none"]),
    "target": (["--data.poison.target", "11"], ["`target`", "[0, 10)", "11"]),
    "trigger too large": (["--data.poison.trigger.init_args.size", "9"], ["`size`", "8 x 8", "9 x 9"]),
    "splits": (["--data.splits", "{inject: 0.9, consolidate: 0.2}"], ["`splits`", "at most 1", "1.1"]),
    "split without a class": (["--data.subset", "12"], ["split `", "class"]),
    "unknown split": (["--trainer.phases.consolidate.split", "cons"], ["no split `cons`", "inject, consolidate"]),
    "start_from": (["--trainer.phases.consolidate.start_from", "injct"], ["`consolidate`", "`start_from`", "`injct`"]),
    "circle": (["--trainer.phases.inject.start_from", "consolidate"], ["`inject`", "`start_from`", "circle"]),
    "unknown phase": (["--trainer.phases.conolidate.max_epochs", "1"], ["conolidate", "Did you mean `consolidate`?"]),
    "unknown phase option": (["--trainer.phases.consolidate.lr", "0.1"], ["`consolidate`", "`lr`"]),
    "unknown Trainer argument of a phase": (
        ["--trainer.phases.inject.trainer", "{max_epoch: 3}"], ["`inject`", "`trainer.max_epoch`"],
    ),
    "callback's value": (
        ["--trainer.phases.inject.callbacks",
         "[{class_path: lightning_bd.callbacks.SharpnessAwareMinimization, init_args: {rho: -1}}]"],
        ["`rho`", "-1"],
    ),
    "no poison": (["--data.poison", "null"], ["`inject`", "`data.poison` is not set"]),
    "classes": (["--model.num_classes", "5"], ["`num_classes` 5", "DigitsDataModule has 10"]),
    "missing checkpoint": (["--ckpt_path", "last.ckpt"], ["without `ckpt_path`"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data.poison.rte", "0.1"),
        ("--data.poison.trigger.sise", "1"),
        ("--data.subste", "1"),
        ("--data.poison.rate", "x"),
    ],
)
def test_a_nested_option_is_named_as_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-bd", "fit", "--config", "small.yaml", option, value])
    with pytest.raises(SystemExit, match="2"):
        main()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {option}: ")
    assert last == "All options: lightning-bd fit --help"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(lightning_bd: Command, tmp_path: Path, case: str) -> None:
    options, words = BAD[case]
    lightning_bd("fit", "--config", "small.yaml", *options).check_refused(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed_everything: 1\nseed_everything: 2\n", ["bad.yaml", "`seed_everything` is given twice", "line 2"]),
        ("trainer: {phases: {a: {max_epochs: 1}, a: {max_epochs: 2}}}\n", ["bad.yaml", "`a` is given twice"]),
        (
            "trainer: {phases: {a: {max_epoch: 1}}}\n",
            ["Phase `a`", "no option `max_epoch`", "Did you mean `max_epochs`?"],
        ),
        ("trainer: {phases: {a: 3}}\n", ["Phase `a`", "bad.yaml", "3"]),
        ("trainer: {phases: [{name: a}]}\n", ["bad.yaml", "`trainer.phases` must map names to phases"]),
        ("model: {num_clases: 3}\n", ["num_clases"]),
        ("trainer: [\n", ["bad.yaml", "line 2"]),
        ("- a\n- b\n", ["bad.yaml", "is not a mapping"]),
    ],
)
def test_a_bad_config_is_named(lightning_bd: Command, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    lightning_bd("fit", "--config", "small.yaml", "--config", "bad.yaml").check_refused(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "small.yaml"]


@pytest.mark.parametrize("name", ["sbl_digit", "missing.yaml"])
def test_an_unknown_config_lists_the_shipped_ones(lightning_bd: Command, name: str) -> None:
    done = lightning_bd("fit", "--config", name)
    done.check_refused([f"`{name}`", *shipped_configs()])
    assert ("Did you mean `sbl_digits`?" in done.err) == (name == "sbl_digit")


@pytest.mark.parametrize(("args", "words"), [([], ["subcommand"]), (["fitt"], ["fitt", "fit", "test"])])
def test_a_wrong_subcommand(lightning_bd: Command, args: list[str], words: list[str]) -> None:
    lightning_bd(*args).check_refused(words)


def test_a_checkpoint_that_does_not_fit(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "00_inject" / "final.ckpt"
    command = ["test", "--config", "small.yaml", "--ckpt_path"]
    wider = lightning_bd(*command, checkpoint, "--model.backbone.init_args.width=8")
    wider.check_refused([str(checkpoint), "`backbone.features.0.weight`", "(4, 1, 3, 3)", "(8, 1, 3, 3)"])
    other = lightning_bd(*command, checkpoint, "--model.backbone=lightning_bd.backbones.resnet20",
                         "--model.backbone.in_channels=1", "--model.backbone.num_classes=10")  # fmt: skip
    other.check_refused([str(checkpoint), "`backbone.", "is not in the checkpoint"])
    lightning_bd(*command, "missing.ckpt").check_refused(["missing.ckpt", "final.ckpt"])
    (tmp_path / "broken.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    lightning_bd(*command, "broken.ckpt").check_refused(["broken.ckpt"])


def test_a_loss_that_is_not_finite_leaves_with_1(lightning_bd: Command, tmp_path: Path) -> None:
    done = lightning_bd(
        "fit", "--config", "small.yaml", "--trainer.phases.inject.optimizer.init_args.lr", "1e30",
        "--trainer.phases.inject.max_epochs=5",
    )  # fmt: skip
    assert done.status == 1
    assert "error: Phase `inject`: the loss is not finite at step" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs" / "small" / "results.csv").exists()


def test_the_place_of_an_error_can_be_seen(lightning_bd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Expected argument `target` to be a class"):
        lightning_bd("fit", "--config", "small.yaml", "--data.poison.target", "11")


def command(
    *args: str, folder: Path, module: Sequence[str] = ("-m", "lightning_bd")
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *module, *args], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_the_command_fits_and_prints_nothing_alarming(tmp_path: Path) -> None:
    done = command("fit", "--config", "small.yaml", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=true",
                   "--trainer.logger=true", folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Test set, after each phase" in done.stdout
    assert not re.search("warn|traceback|deprecat|litlogger|litmodels", done.stdout + done.stderr, re.IGNORECASE)
    assert list(rows(tmp_path / "runs" / "small")) == ["inject", "consolidate"]


@pytest.mark.slow
def test_a_refused_command(tmp_path: Path) -> None:
    done = command("fit", "--config", "small.yaml", "--trainer.max_epohcs=1", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "max_epohcs" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes(tmp_path: Path) -> None:
    options = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    done = command("fit", "--config", "sbl_digits", "--trainer.max_epochs=2", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Test set, after each phase") == 1
    run = tmp_path / "runs" / "sbl_digits"
    assert len(rows(run)) == 6
    # One process measures the same as two.
    alone = command("test", "--config", "sbl_digits", "--ckpt_path", str(run / "00_inject/final.ckpt"), folder=tmp_path)
    row = rows(run)["inject"]
    assert printed(alone.stdout)["test/clean_accuracy"] == pytest.approx(100 * float(row["clean_accuracy"]), abs=0.006)
    assert printed(alone.stdout)["test/attack_success_rate"] == pytest.approx(
        100 * float(row["attack_success_rate"]), abs=0.006
    )


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_that_something_else_started(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lightning_bd")
    options = ["--trainer.max_epochs=1", "--trainer.devices=2", "--trainer.strategy=ddp"]
    for fresh in ([], ["--fresh"]):  # with an old run, none of the processes may take its phases for finished
        done = command("fit", "--config", "small.yaml", *options, *fresh, folder=tmp_path, module=torchrun)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Test set, after each phase") == 1
        assert list(rows(tmp_path / "runs" / "small")) == ["inject", "consolidate"]
    assert len(list((tmp_path / "runs").glob("small.old-*"))) == 1


def test_true_half_precision(lightning_bd: Command, tmp_path: Path) -> None:
    done = lightning_bd("fit", "--config", "small.yaml", "--trainer.precision=bf16-true")
    assert done.status == 0, done.err
    state = torch.load(tmp_path / "runs/small/01_consolidate/final.ckpt", weights_only=True)["state_dict"]
    assert state["backbone.fc.weight"].dtype == torch.bfloat16


def test_mixed_precision(lightning_bd: Command, tmp_path: Path) -> None:
    sam = "[{class_path: lightning_bd.callbacks.SharpnessAwareMinimization}]"
    ewc = "[{class_path: lightning_bd.callbacks.ElasticWeightConsolidation}]"
    done = lightning_bd(
        "fit", "--config", "small.yaml", "--trainer.precision=bf16-mixed", "--trainer.phases.inject.callbacks", sam,
        "--trainer.phases.consolidate.callbacks", ewc,
    )  # fmt: skip
    assert done.status == 0, done.err
    state = torch.load(tmp_path / "runs/small/01_consolidate/final.ckpt", weights_only=True)["state_dict"]
    assert state["backbone.fc.weight"].dtype == torch.float32
    assert len(rows(tmp_path / "runs/small")) == 2
