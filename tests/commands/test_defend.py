"""``lightning-bd defend``: what it runs, skips, writes and refuses."""

import csv
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_bd.callbacks.defense import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.checkpointing import RECORD_KEY, read_checkpoint
from lightning_bd.commands.defend import load_defenses, plan_phases, shipped_defenses
from lightning_bd.config_files import ConfigError
from lightning_bd.functional.digest import weights_sha256

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("workplace")

QUICK = """
callbacks: [{class_path: lightning_bd.callbacks.FineTuning, init_args: {learning_rates: [RATE], max_epochs: 2}}]
"""


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """Two defenses of one's own that take a moment."""
    for name, rate in (("slow", "0.01"), ("fast", "0.2")):
        (tmp_path / f"{name}.yaml").write_text(QUICK.replace("RATE", rate))
    return tmp_path


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return {row["phase"]: row for row in csv.DictReader(file)}


def test_defenses_are_compared_in_one_table(lightning_bd: Command, trained: Path, quick: Path) -> None:
    checkpoint = trained / "00_inject" / "final.ckpt"
    options = ["--config", "small.yaml", "--ckpt_path", checkpoint, "--trainer.default_root_dir", quick / "out"]
    done = lightning_bd("defend", *options, "--defenses", "slow.yaml,fast.yaml")
    assert done.status == 0, done.err
    folder = quick / "out" / "defend" / "00_inject"
    found = rows(folder)
    assert list(found) == ["none", "slow", "fast"]
    # The undefended row is what the run itself measured.
    measured = rows(trained)["inject"]
    for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy", "attack_success_low"):
        assert found["none"][name] == measured[name]
    assert (found["none"]["distance"], found["none"]["defense_effectiveness_rating"]) == ("0.0", "")
    assert float(found["fast"]["distance"]) > float(found["slow"]["distance"]) > 0
    for name in ("slow", "fast"):
        assert 0 <= float(found[name]["defense_effectiveness_rating"]) <= 1
        assert name in done.out
        start = read_checkpoint(checkpoint)
        purified = read_checkpoint(next(folder.glob(f"*_{name}")) / "final.ckpt")
        assert weights_sha256(purified["state_dict"]) != weights_sha256(start["state_dict"])
        # The manifest stays with the model, as it came.
        assert purified[RECORD_KEY]["manifest"] == start[RECORD_KEY]["manifest"]


def test_finished_defenses_are_skipped_and_keep_their_rows(lightning_bd: Command, trained: Path, quick: Path) -> None:
    options = ["--ckpt_path", trained / "00_inject" / "final.ckpt", "--trainer.default_root_dir", quick / "out"]
    assert lightning_bd("defend", *options, "--defenses", "slow.yaml").status == 0
    folder = quick / "out" / "defend" / "00_inject"
    before, written = rows(folder), (folder / "01_slow" / "final.ckpt").stat().st_mtime_ns
    assert lightning_bd("defend", *options, "--defenses", "fast.yaml").status == 0
    after = rows(folder)
    assert list(after) == ["none", "slow", "fast"]
    assert {name: after[name] for name in before} == before
    assert lightning_bd("defend", *options, "--defenses", "fast.yaml", "slow.yaml").status == 0
    assert rows(folder) == after
    assert (folder / "01_slow" / "final.ckpt").stat().st_mtime_ns == written


class Fails(Defense):
    """Has a bug."""

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        raise RuntimeError("singular matrix")


class Breaks(Defense):
    """Leaves a model that is not one."""

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return Report(note="done")


class Refuses(Defense):
    """Needs what no model has."""

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        raise NotApplicableError("no crystal ball")


@pytest.fixture
def odd(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Defenses that fail, break the model and refuse, as files."""
    module = types.ModuleType("odd_defenses")
    monkeypatch.setitem(sys.modules, "odd_defenses", module)
    for defense in (Fails, Breaks, Refuses):
        setattr(module, defense.__name__, defense)
        monkeypatch.setattr(defense, "__module__", "odd_defenses")
        name = defense.__name__
        (quick / f"{name}.yaml").write_text(f"callbacks: [{{class_path: odd_defenses.{name}}}]\n")
    return quick


@pytest.mark.filterwarnings("ignore:The defense `Fails`")
def test_one_that_fails_does_not_stop_the_others(lightning_bd: Command, trained: Path, odd: Path) -> None:
    options = ["--ckpt_path", trained / "00_inject" / "final.ckpt", "--trainer.default_root_dir", odd / "out"]
    files = ["Refuses.yaml", "Fails.yaml", "Breaks.yaml", "slow.yaml"]
    done = lightning_bd("defend", *options, "--defenses", *files)
    assert done.status == 1
    assert "`Fails`: RuntimeError: singular matrix" in done.err
    folder = odd / "out" / "defend" / "00_inject"
    found = rows(folder)
    assert list(found) == ["none", "Refuses", "Breaks", "slow"]
    assert found["Refuses"]["note"] == "not applicable: no crystal ball"
    assert found["Breaks"]["note"].startswith("failed: the purified model has weights that are not finite")
    for name in ("Refuses", "Breaks"):
        assert {found[name][rate] for rate in ("clean_accuracy", "attack_success_rate", "distance")} == {""}
        assert not list(folder.glob(f"*_{name}/final.ckpt"))
        assert name in done.out
    assert float(found["slow"]["clean_accuracy"]) > 0


def test_rates_of_a_part_of_the_test_set_have_no_interval(lightning_bd: Command, trained: Path, quick: Path) -> None:
    options = ["--ckpt_path", trained / "00_inject" / "final.ckpt", "--trainer.default_root_dir", quick / "out"]
    done = lightning_bd("defend", *options, "--defenses=slow.yaml", "--trainer.limit_test_batches=1")
    assert done.status == 0, done.err
    row = rows(quick / "out" / "defend" / "00_inject")["slow"]
    assert float(row["attack_success_rate"]) >= 0
    assert row["attack_success_low"] == row["attack_success_high"] == ""


def test_another_checkpoint_of_the_same_name_is_refused(lightning_bd: Command, trained: Path, quick: Path) -> None:
    options = ["--config=small.yaml", "--trainer.default_root_dir", quick / "out", "--defenses", "slow.yaml"]
    for name in ("00_inject", "01_consolidate"):
        (quick / name).mkdir()
        shutil.copy(trained / name / "final.ckpt", quick / name / "model.ckpt")
    assert lightning_bd("defend", *options, "--ckpt_path", quick / "00_inject" / "model.ckpt").status == 0
    done = lightning_bd("defend", *options, "--ckpt_path", quick / "01_consolidate" / "model.ckpt")
    done.check_refused(["another configuration of this run", "weights_sha256"])


def test_a_changed_defense_is_refused(lightning_bd: Command, trained: Path, quick: Path) -> None:
    options = ["--ckpt_path", trained / "00_inject" / "final.ckpt", "--trainer.default_root_dir", quick / "out"]
    assert lightning_bd("defend", *options, "--defenses", "slow.yaml").status == 0
    (quick / "slow.yaml").write_text(QUICK.replace("RATE", "0.02"))
    done = lightning_bd("defend", *options, "--defenses", "slow.yaml")
    done.check_refused(["phase `slow`", "learning_rates", "--fresh"])


def test_without_a_manifest_attack_success_is_unknown(lightning_bd: Command, trained: Path, quick: Path) -> None:
    checkpoint = read_checkpoint(trained / "00_inject" / "final.ckpt")
    torch.save({"state_dict": checkpoint["state_dict"]}, quick / "foreign.ckpt")
    options = ["--config", "small.yaml", "--ckpt_path", "foreign.ckpt", "--defenses", "slow.yaml"]
    done = lightning_bd("defend", *options)
    assert done.status == 0, done.err
    for row in rows(quick / "runs" / "small" / "defend" / "foreign").values():
        assert float(row["clean_accuracy"]) > 0
        assert row["attack_success_rate"] == row["attack_success_low"] == row["robust_accuracy"] == ""
        assert row["defense_effectiveness_rating"] == ""
        assert row["note"].endswith("attack unknown: the checkpoint has no manifest")
    assert "unknown" in done.out
    # The config's trigger, by the user's word.
    done = lightning_bd("defend", *options, "--override-trigger", "--trainer.default_root_dir", quick / "word")
    assert done.status == 0, done.err
    assert float(rows(quick / "word" / "defend" / "foreign")["none"]["attack_success_rate"]) >= 0


def test_a_defense_that_does_not_exist(lightning_bd: Command, trained: Path) -> None:
    done = lightning_bd(
        "defend", "--config=small.yaml", f"--ckpt_path={trained / '00_inject' / 'final.ckpt'}", "--defenses=ft,anq"
    )
    done.check_refused(["`anq`", *shipped_defenses(), "Did you mean `anp`?"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "defence"], ["no split `defence`", "inject, consolidate, defend"]),
        (["--data.splits", "{inject: 0.9}"], ["no split `defend`", "data.splits"]),
        (["--data.splits", "{inject: 0.9, defend: 0.05}"], ["defender's images", "too few"]),
        (["--ckpt_path", "missing.ckpt"], ["missing.ckpt"]),
        (["--defenses", ""], ["No defense is named", "ft"]),
    ],
)
def test_bad_input_is_named(lightning_bd: Command, trained: Path, options: list[str], words: list[str]) -> None:
    given = ["--config=small.yaml", f"--ckpt_path={trained / '00_inject' / 'final.ckpt'}", "--defenses=ft"]
    lightning_bd("defend", *given, *options).check_refused(words)


def test_weights_that_are_not_finite_are_refused(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(trained / "00_inject" / "final.ckpt")
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    done = lightning_bd("defend", "--config=small.yaml", "--ckpt_path=broken.ckpt", "--defenses=ft")
    done.check_refused(["broken.ckpt", "not finite"])


def test_shipped_defenses_are_phases_with_a_defense() -> None:
    wanted = ["anp", "bnp", "clp", "ep", "fine_pruning", "ft", "ft_sam", "ibau", "nad", "neural_cleanse"]
    assert sorted(shipped_defenses()) == wanted
    phases = load_defenses("all")
    assert sorted(phases) == wanted
    for name, phase in plan_phases(phases, "defend", 32).items():
        assert phase.defends, name
        assert phase.max_epochs == 0
        assert phase.start_from == (None if name == "none" else "none")
    assert list(load_defenses("nad ft")) == list(load_defenses(["nad", "ft"])) == list(load_defenses("nad,ft"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "is not a mapping"),
        ("epochs: 3\n", "is not a phase"),
        ("callbacks: [{class_path: lightning_bd.callbacks.FineTuning, init_args: {rates: [1]}}]\n", "rates"),
        ("callbacks: [{class_path: lightning_bd.callbacks.FineTuning, init_args: {momentum: 2}}]\n", "momentum"),
    ],
)
def test_a_file_that_is_no_defense(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_defenses("mine.yaml")


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The defense `ft` is named twice"):
        load_defenses("ft,ft")
    (tmp_path / "none.yaml").write_text(QUICK.replace("RATE", "0.1"))
    with pytest.raises(ConfigError, match=r"`none` .* the undefended model's row"):
        load_defenses("none.yaml")


def test_a_phase_that_would_see_all_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"split": "inject", "max_epochs": 3}))
    with pytest.raises(Exception, match="`mine` would see all of the data"):
        plan_phases(load_defenses("mine.yaml"), "defend", None)
