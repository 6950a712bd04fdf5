"""``lightning-bd score`` and ``filter``, as a user types them."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from lightning_bd.callbacks import Detector
from lightning_bd.checkpointing import RECORD_KEY, read_checkpoint, save_atomically
from lightning_bd.cli import main
from lightning_bd.commands.detectors import load_detectors, shipped_detectors
from lightning_bd.config_files import ConfigError
from lightning_bd.datamodules import DigitsDataModule

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def static_run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose poisoned images are fixed."""
    folder = tmp_path_factory.mktemp("static")
    config = (trained.parent / "small.yaml").read_text()
    (folder / "static.yaml").write_text(config.replace("poisoned: true", "poisoned: static"))
    before = {name: os.environ.pop(name, None) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    try:
        main(["fit", "--config", str(folder / "static.yaml"), f"--trainer.default_root_dir={folder / 'run'}"])
    finally:
        del os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"]
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
    return folder / "run"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def folder_of_images(path: Path, count: int = 6) -> Path:
    path.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{number}.png")
    return path


def test_a_checkpoint_is_scored(lightning_bd: Command, static_run: Path, tmp_path: Path) -> None:
    noise = folder_of_images(tmp_path / "noise")
    checkpoint = static_run / "01_consolidate" / "final.ckpt"
    given = ("score", "--ckpt_path", checkpoint, "--max_images", 20, "--ood.noise", noise,
             "--trainer.default_root_dir", tmp_path / "out")  # fmt: skip
    done = lightning_bd(*given, "--detectors", "energy,odin", "spectral")
    assert done.status == 0, done.err
    folder = tmp_path / "out" / "score" / "01_consolidate"
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    assert [name for name in table if name not in ("index", "set", "label", "prediction", "positive")] == [
        "energy", "odin", "spectral",
    ]  # fmt: skip
    names, values = np.array(table["set"]), {name: np.array(table[name], dtype=float) for name in ("energy", "odin")}
    # ODIN runs the model on changed images: at most 20 of each; energy and ODIN never see the training images.
    for each in ("clean", "poisoned"):
        assert np.isfinite(values["odin"][names == each]).sum() == 20
        assert np.isfinite(values["energy"][names == each]).all()
    assert np.isnan(values["energy"][names == "train"]).all()
    assert (names == "noise").sum() == 6
    assert set(np.array(table["label"])[names == "noise"]) == {-1}
    # 60 % of 300 images, a tenth of them poisoned.
    assert np.array(table["positive"])[names == "train"].sum() == 18
    found = {(row["detector"], row["set"]): row for row in rows(folder / "detection.csv")}
    assert set(found) == {("energy", "poisoned"), ("energy", "noise"), ("odin", "poisoned"), ("odin", "noise"),
                          ("spectral", "train")}  # fmt: skip
    chosen = (names == "clean") | (names == "noise")
    expected = roc_auc_score((names == "noise")[chosen], values["energy"][chosen])
    assert float(found["energy", "noise"]["auroc"]) == pytest.approx(expected, abs=1e-6)
    for name in ("roc.png", "histogram_energy.png", "suspicious_spectral.png"):
        with Image.open(folder / name) as picture:
            assert picture.size[0] > 100
    assert "energy" in done.out
    # A second call scores only what is new.
    before = (folder / "parts" / "odin" / "clean.parquet").stat().st_mtime_ns
    again = lightning_bd(*given, "--detectors", "odin", "msp")
    assert again.status == 0, again.err
    assert (folder / "parts" / "odin" / "clean.parquet").stat().st_mtime_ns == before
    assert pq.read_table(folder / "scores.parquet").column_names[-2:] == ["odin", "msp"]


def changed_checkpoint(run: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> tuple[Any, ...]:
    """Arguments that score a copy of a checkpoint with another record; the config names no poison."""
    checkpoint = read_checkpoint(run / "00_inject" / "final.ckpt")
    change(checkpoint[RECORD_KEY])
    save_atomically(checkpoint, folder / "run" / "00_inject" / "final.ckpt")
    return (
        "score", "--config", run / "config.yaml", "--ckpt_path", folder / "run" / "00_inject" / "final.ckpt",
        "--data.poison", "null", "--max_images", 10, "--trainer.default_root_dir", folder / "out",
    )  # fmt: skip


@pytest.mark.slow
def test_the_poisoned_training_images_are_those_of_the_manifest(
    lightning_bd: Command, static_run: Path, tmp_path: Path
) -> None:
    chosen: list[int] = []

    def move(record: dict[str, Any]) -> None:
        """As if a scorer had chosen others."""
        data = DigitsDataModule(None, {"inject": 0.6, "consolidate": 0.2, "defend": 0.2}, subset=300)
        chosen.extend(data.positions(("inject",))[20:38].tolist())
        record["tensors"]["indices.inject"] = torch.tensor(chosen)

    listed = load_file(static_run / "manifest.safetensors")["indices.inject"].tolist()
    table = tmp_path / "out/score/00_inject/parts/spectral/train.parquet"
    for change, expected in ((lambda record: None, listed), (move, chosen)):
        arguments = changed_checkpoint(static_run, tmp_path, change)
        done = lightning_bd(*arguments, "--detectors", "spectral")
        assert done.status == 0, done.err
        content = pq.read_table(table).to_pydict()
        found = np.array(content["index"])[np.array(content["positive"], dtype=bool)]
        assert sorted(found.tolist()) == expected


def test_detectors_that_need_no_training_images_go_on_without(
    lightning_bd: Command, static_run: Path, tmp_path: Path
) -> None:
    def crafted(record: dict[str, Any]) -> None:
        made: dict[str, Any] = {"class": "LabelConsistent", "arguments": {}, "attack_images": None}
        record["manifest"] |= {"crafting": made, "mode": "static"}

    given = changed_checkpoint(static_run, tmp_path, crafted)
    with pytest.warns(UserWarning, match=r"The training images are not scored: .* were crafted by LabelConsistent"):
        done = lightning_bd(*given, "--detectors", "energy,spectral")
    assert done.status == 0, done.err
    assert {row["detector"] for row in rows(tmp_path / "out/score/00_inject/detection.csv")} == {"energy"}
    for asked in (("energy,spectral", "--train", "true"), ("spectral",)):
        lightning_bd(*given, "--detectors", *asked).check_refused(["were crafted by LabelConsistent"])
    filtered = ("filter", *given[1:7], *given[9:], "--detector", "spectral")
    lightning_bd(*filtered).check_refused(["were crafted by LabelConsistent"])

    def forgetful(record: dict[str, Any]) -> None:
        del record["tensors"]["indices.inject"]

    given = changed_checkpoint(static_run, tmp_path, forgetful)
    lightning_bd(*given, "--detectors", "spectral").check_refused(["does not say which images phase `inject` poisoned"])


@pytest.mark.slow
def test_a_detector_that_fails_does_not_lose_the_others(
    lightning_bd: Command, static_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "greedy.yaml").write_text(
        "class_path: lightning_bd.callbacks.KNearestNeighbors\ninit_args: {k: 100000}\n"
    )
    (tmp_path / "lost.yaml").write_text("class_path: lightning_bd.callbacks.MaxLogit\ninit_args: {layer: encodr}\n")
    given = ("score", "--ckpt_path", static_run / "00_inject" / "final.ckpt", "--max_images", 10, "--train", "true",
             "--trainer.default_root_dir", tmp_path / "out")  # fmt: skip
    for wanted, kept in ((("greedy.yaml", "lost.yaml", "msp"), ["msp"]), (("greedy.yaml", "odin"), ["odin"])):
        with pytest.warns(UserWarning, match=r"The detector `\w+` failed"):
            done = lightning_bd(*given, "--detectors", *wanted)
        assert done.status == 1
        assert "These detectors failed" in done.err
        for name in {"greedy", "lost"} & {each.partition(".")[0] for each in wanted}:
            assert f"`{name}`" in done.err
        assert sorted({row["detector"] for row in rows(tmp_path / "out/score/00_inject/detection.csv")}) == kept
    # ODIN runs the model on changed images: as many of the training images too.
    table = pq.read_table(tmp_path / "out/score/00_inject/parts/odin/train.parquet")
    assert table.num_rows == 10


@pytest.mark.slow
def test_sets_before_a_broken_one_are_kept(lightning_bd: Command, static_run: Path, tmp_path: Path) -> None:
    bad = folder_of_images(tmp_path / "bad")
    (bad / "a.png").write_text("no image")
    (bad / "folder.png").mkdir()
    given = ("score", "--ckpt_path", static_run / "00_inject" / "final.ckpt", "--detectors", "msp",
             "--trainer.default_root_dir", tmp_path / "out")  # fmt: skip
    done = lightning_bd(*given, "--ood.bad", bad)
    done.check_refused(["Cannot read the image", "a.png"])
    parts = tmp_path / "out/score/00_inject/parts/msp"
    assert sorted(path.name for path in parts.glob("*.parquet")) == ["clean.parquet", "poisoned.parquet"]
    (bad / "a.png").unlink()
    assert lightning_bd(*given, "--ood.bad", bad).status == 0
    # Other images in a folder of the same name are scored anew.
    before = pq.read_table(parts / "bad.parquet")["msp"].to_pylist()
    for number in range(6):
        Image.fromarray(np.full((9, 9, 3), 40 * number, dtype=np.uint8)).save(bad / f"{number}.png")
    assert lightning_bd(*given, "--ood.bad", bad).status == 0
    assert pq.read_table(parts / "bad.parquet")["msp"].to_pylist() != before


@pytest.mark.slow
def test_scores_of_another_data_set_are_refused(lightning_bd: Command, static_run: Path, tmp_path: Path) -> None:
    given = ("score", "--ckpt_path", static_run / "00_inject" / "final.ckpt", "--detectors", "msp",
             "--trainer.default_root_dir", tmp_path / "out")  # fmt: skip
    assert lightning_bd(*given).status == 0
    config = static_run / "config.yaml"
    for changed, word in (
        (("--data.subset", 200), "data_sha256"),
        (("--data.splits", "{inject: 0.5, consolidate: 0.2, defend: 0.3}"), "fit_images_sha256"),
        (("--data.exclude", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"), "fit_images_sha256"),
        (("--config", config, "--model.normalize", "{mean: [0.5], std: [0.1]}"), "model."),
        (("--trainer.precision", "bf16-mixed"), "precision"),
    ):
        other = lightning_bd(*given, *changed)
        other.check_refused(["scores in", word, "--fresh"])
    fresh = lightning_bd(*given, "--data.subset", 200, "--fresh")
    assert fresh.status == 0, fresh.err
    assert len(list((tmp_path / "out" / "score").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--detectors", "enrgy"), ["no detector `enrgy`", "Did you mean `energy`?"]),
        (("--detectors", "msp,msp"), ["The detector `msp` is named twice"]),
        (("--detectors", "mine.yaml"), ["no file `mine.yaml` with a detector"]),
        (("--detectors", "label.yaml"), ["A detector cannot be called `label`"]),
        (("--detectors", "msp", "--train", "--split", "defend"), ["--train"]),
        (("--detectors", "msp", "--ood.far", "nowhere"), ["There is no folder", "nowhere"]),
        (("--detectors", "msp", "--ood.clean", "."), ["`clean` cannot be the name of a set"]),
        (("--detectors", "msp", "--max_images", 0), ["`max_images` to be a positive integer, but got 0"]),
        (("--detectors", "msp", "--split", "defence"), ["has no split `defence`"]),
    ],
)
def test_what_cannot_be_scored(
    lightning_bd: Command, static_run: Path, tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    (tmp_path / "label.yaml").write_text("class_path: lightning_bd.callbacks.MaxLogit\n")
    lightning_bd(
        "score", "--ckpt_path", static_run / "00_inject" / "final.ckpt", "--trainer.default_root_dir", tmp_path / "out",
        *arguments,
    ).check_refused(words)  # fmt: skip


@pytest.mark.slow
def test_suspicious_images_are_left_out_and_the_model_trained_again(
    lightning_bd: Command, static_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "exclude.json"
    done = lightning_bd(
        "filter", "--ckpt_path", static_run / "01_consolidate" / "final.ckpt", "--detector", "spectral", "--keep", 0.8,
        "--output", file, "--trainer.default_root_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.status == 0, done.err
    content = json.loads(file.read_text())
    # A fifth of the 180 images of the poisoned phase's split.
    assert len(content["excluded"]) == 36
    scored = pq.read_table(tmp_path / "out/score/01_consolidate/parts/spectral/train.parquet").to_pydict()
    order = np.argsort(-np.array(scored["spectral"]), kind="stable")[:36]
    assert sorted(np.array(scored["index"])[order].tolist()) == content["excluded"]
    hits = int(np.array(scored["positive"])[order].sum())
    assert f"Among them are {hits} of the 18 poisoned ones" in done.out
    again = lightning_bd(
        "fit", "--config", static_run / "config.yaml", "--data.exclude", file,
        "--trainer.default_root_dir", tmp_path / "cleaned",
    )  # fmt: skip
    assert again.status == 0, again.err
    # The rest of the attacker's images are those of before.
    before, after = (
        load_file(run / "manifest.safetensors")["indices.inject"] for run in (static_run, tmp_path / "cleaned")
    )
    left = set(before.tolist()) - set(content["excluded"])
    assert set(after.tolist()) == left
    assert len(left) == 18 - hits
    # What a second filter leaves out comes to that of the first.
    second = tmp_path / "second.json"
    more = lightning_bd(
        "filter", "--ckpt_path", tmp_path / "cleaned" / "01_consolidate" / "final.ckpt", "--detector", "spectral",
        "--keep", 0.9, "--output", second,
    )  # fmt: skip
    assert more.status == 0, more.err
    both = json.loads(second.read_text())["excluded"]
    assert set(content["excluded"]) < set(both)
    assert len(both) == 36 + 14
    assert "beside the 36 that were before" in more.out


@pytest.mark.slow
def test_what_cannot_be_filtered(lightning_bd: Command, trained: Path, static_run: Path, tmp_path: Path) -> None:
    out = ("--trainer.default_root_dir", tmp_path / "out")
    dynamic = lightning_bd("filter", "--ckpt_path", trained / "00_inject" / "final.ckpt", "--detector", "msp", *out)
    dynamic.check_refused(["Phase `inject` poisons each batch anew", "poisoned: static"])
    given = ("filter", "--ckpt_path", static_run / "00_inject" / "final.ckpt", *out)
    lightning_bd(*given, "--keep", 1).check_refused(["`keep` to be a share in (0, 1), but got 1"])
    lightning_bd(*given, "--detector", "msp,gen").check_refused(["`filter` takes one detector, but got msp, gen"])
    foreign = tmp_path / "model.ckpt"
    foreign.write_bytes((static_run / "00_inject" / "final.ckpt").read_bytes())
    unknown = lightning_bd(
        "filter", "--config", static_run / "config.yaml", "--ckpt_path", foreign, "--detector", "msp", *out
    )
    unknown.check_refused(["not known which poisoned images"])


def test_every_shipped_detector_is_made_with_its_own_name() -> None:
    assert {"ctm", "energy", "knn", "cd", "strip"} <= set(shipped_detectors())
    for name, detector in load_detectors("all").items():
        assert isinstance(detector, Detector)
        assert detector.name == name


def test_a_file_that_is_no_detector_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    for content in ("class_path: torch.nn.Linear", "class_path: lightning_bd.callbacks.Energy\ninit_args: {heat: 2}"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"odd\.yaml is not a detector"):
            load_detectors(str(path))
