"""``lightning-bd interpolate``, ``landscape`` and ``sharpness``: tables, figures and what is refused."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bd.checkpointing import read_checkpoint

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("workplace")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measured(run: Path, phase: str) -> dict[str, str]:
    return next(row for row in table(run / "results.csv") if row["phase"] == phase)


def check_figure(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.glob("events.out.tfevents.*")), "no figure for TensorBoard"


def test_interpolate_has_both_models_at_its_ends(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    ends = [trained / "00_inject" / "final.ckpt", trained / "01_consolidate" / "final.ckpt"]
    done = lightning_bd("interpolate", *ends, "--points=3", f"--trainer.default_root_dir={tmp_path / 'out'}")
    assert done.status == 0, done.err
    folder = tmp_path / "out" / "interpolate" / "00_inject--01_consolidate"
    rows = table(folder / "interpolation.csv")
    assert [row["position"] for row in rows] == ["0", "0.5", "1"]
    for row, phase in zip((rows[0], rows[2]), ("inject", "consolidate"), strict=True):
        for name in ("clean_accuracy", "attack_success_rate"):
            assert float(row[name]) == pytest.approx(float(measured(trained, phase)[name]), abs=1e-5)
    check_figure(folder / "interpolation.png")


def test_interpolate_may_recalibrate_batch_norm(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    ends = [trained / "00_inject" / "final.ckpt", trained / "01_consolidate" / "final.ckpt"]
    losses = []
    for option in ("false", "true"):
        root = f"--trainer.default_root_dir={tmp_path / option}"
        done = lightning_bd("interpolate", *ends, "--points=2", f"--recalibrate={option}", root)
        assert done.status == 0, done.err
        file = tmp_path / option / "interpolate" / "00_inject--01_consolidate" / "interpolation.csv"
        losses.append([float(row["clean_loss"]) for row in table(file)])
    assert losses[0] != losses[1]


def test_landscape_has_the_model_in_its_middle(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    root = f"--trainer.default_root_dir={tmp_path / 'out'}"
    done = lightning_bd("landscape", trained / "00_inject" / "final.ckpt", "--points=3", "--reach=0.5", root)
    assert done.status == 0, done.err
    rows = table(tmp_path / "out" / "landscape" / "00_inject" / "landscape.csv")
    assert [(row["alpha"], row["beta"]) for row in rows] == [(a, b) for a in ("-0.5", "0", "0.5") for b in ("-0.5", "0", "0.5")]  # fmt: skip # noqa: E501
    for name in ("clean_accuracy", "attack_success_rate"):
        assert float(rows[4][name]) == pytest.approx(float(measured(trained, "inject")[name]), abs=1e-5)
    check_figure(tmp_path / "out" / "landscape" / "00_inject" / "landscape.png")


def test_sharpness_of_clean_and_triggered_images(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    root = f"--trainer.default_root_dir={tmp_path / 'out'}"
    done = lightning_bd("sharpness", trained / "00_inject" / "final.ckpt", "--iterations=30", "--max_images=100", root)
    assert done.status == 0, done.err
    rows = table(tmp_path / "out" / "sharpness" / "00_inject" / "sharpness.csv")
    assert [row["data"] for row in rows] == ["clean", "poisoned"]
    for row in rows:
        assert float(row["worst_loss"]) - float(row["loss"]) == pytest.approx(float(row["sharpness"]), abs=1e-4)
        assert float(row["sharpness"]) > 0
        assert row["data"] in done.out
    check_figure(tmp_path / "out" / "sharpness" / "00_inject" / "sharpness.png")


@pytest.mark.slow
def test_without_a_manifest_only_clean_images(lightning_bd: Command, trained: Path, tmp_path: Path) -> None:
    state = read_checkpoint(trained / "00_inject" / "final.ckpt")["state_dict"]
    torch.save({"state_dict": state}, tmp_path / "foreign.ckpt")
    done = lightning_bd("interpolate", "foreign.ckpt", "foreign.ckpt", "--points=2", "--config=small.yaml")
    assert done.status == 0, done.err
    rows = table(tmp_path / "runs" / "small" / "interpolate" / "foreign--foreign" / "interpolation.csv")
    assert {row["attack_success_rate"] for row in rows} == {""}
    # One end that knows the attack is enough, whichever.
    for ends in (("foreign.ckpt", trained / "00_inject" / "final.ckpt"), (trained / "00_inject" / "final.ckpt", "foreign.ckpt")):  # fmt: skip # noqa: E501
        done = lightning_bd("interpolate", *ends, "--points=2", "--config=small.yaml", "--data.poison=null")
        assert done.status == 0, done.err
    rows = table(tmp_path / "runs" / "small" / "interpolate" / "foreign--00_inject" / "interpolation.csv")
    assert all(float(row["attack_success_rate"]) >= 0 for row in rows)


@pytest.mark.slow
def test_other_architectures_and_broken_weights_are_refused(
    lightning_bd: Command, trained: Path, tmp_path: Path
) -> None:
    good = trained / "00_inject" / "final.ckpt"
    wide = ["--model.backbone.init_args.width=8", "--config=small.yaml"]
    lightning_bd("interpolate", good, good, *wide).check_refused([str(good), "another model", "features.0.weight"])
    checkpoint = read_checkpoint(good)
    checkpoint["state_dict"].pop("backbone.fc.bias")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    done = lightning_bd("interpolate", good, "other.ckpt", "--config=small.yaml")
    done.check_refused(["other.ckpt", "`backbone.fc.bias`"])
    checkpoint = read_checkpoint(good)
    checkpoint["state_dict"]["backbone.fc.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    for command in (["landscape", "nan.ckpt"], ["sharpness", "nan.ckpt"], ["interpolate", good, "nan.ckpt"]):
        lightning_bd(*command, "--config=small.yaml").check_refused(["nan.ckpt", "not finite", "backbone.fc.bias"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["interpolate", "--points=1"], ["`points`", "1"]),
        (["landscape", "--points=4"], ["`points`", "odd", "4"]),
        (["landscape", "--reach=0"], ["`reach`", "0.0"]),
        (["sharpness", "--rho=0"], ["`rho`", "0.0"]),
        (["sharpness", "--iterations=0"], ["`iterations`", "0"]),
        (["sharpness", "--max_images=0"], ["`max_images`", "0"]),
    ],
)
def test_values_out_of_range(lightning_bd: Command, trained: Path, command: list[str], words: list[str]) -> None:
    name, option = command
    checkpoints = [trained / "00_inject" / "final.ckpt"] * (2 if name == "interpolate" else 1)
    lightning_bd(name, *checkpoints, option, "--config=small.yaml").check_refused(words)
