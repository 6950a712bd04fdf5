"""No defense depends on the attack or on the test set: not by one bit of the purified weights."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bd.checkpointing import read_checkpoint
from lightning_bd.commands.defend import shipped_defenses

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("workplace")


def test_every_defense_runs_and_none_sees_the_attack(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "00_inject" / "final.ckpt"
    given = ["--config=small.yaml", f"--ckpt_path={checkpoint}", "--defenses=all", "--trainer.max_epochs=1"]
    other = ["--override-trigger", "--data.poison.trigger.init_args.size=3", "--data.poison.target=3",
             "--data.poison.rate=0.3", "--data.test_subset=100"]  # fmt: skip
    for name, options in (("one", []), ("two", other)):
        done = lightning_bd("defend", *given, *options, f"--trainer.default_root_dir={tmp_path / name}")
        assert done.status == 0, done.err
    folders = [tmp_path / name / "defend" / "00_inject" for name in ("one", "two")]
    tables = []
    for folder in folders:
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            tables.append({row["phase"]: row for row in csv.DictReader(file)})
    assert list(tables[0]) == ["none", *shipped_defenses()]
    # The attack and the test set did change.
    assert tables[0]["none"]["clean_accuracy"] != tables[1]["none"]["clean_accuracy"]
    assert tables[0]["none"]["attack_success_rate"] != tables[1]["none"]["attack_success_rate"]
    for name in shipped_defenses():
        assert "not applicable" not in tables[0][name]["note"]
        one, two = (read_checkpoint(next(folder.glob(f"*_{name}")) / "final.ckpt")["state_dict"] for folder in folders)
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, two[key]), f"{name}: {key}"
        assert tables[0][name]["distance"] == tables[1][name]["distance"]
