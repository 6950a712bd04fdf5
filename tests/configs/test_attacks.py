"""Every shipped attack runs behind the base config that the documents name, shortened."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bd.cli import main
from lightning_bd.config_files import shipped_configs
from lightning_bd.manifest import PoisonManifest

ATTACKS = sorted(shipped_configs("attack"))
SURROGATE = "surrogate.init_args.epochs=1"
#: What makes an attack short, and what only its user has.
OPTIONS = {
    "attack/label_consistent": [
        f"--data.poison.crafting.{SURROGATE}", "--data.poison.crafting.steps=2",
        "--data.poison.crafting.robust_steps=1",
    ],
    "attack/narcissus": [
        f"--data.poison.trigger.{SURROGATE}", "--data.poison.trigger.steps=2", "--data.poison.trigger.ood=others",
    ],
    "attack/ssba": ["--data.poison.trigger.steps=2", "--data.poison.trigger.width=4"],
    "attack/precomputed": ["--data.poison.crafting.folder=others/0"],
    "attack/input_aware": ["--model.mask_epochs=1"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "cache"))
    # Lightning 2.6 calls methods that jsonargparse 4.49 renamed.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    generator = np.random.default_rng(0)
    for folder in ("others/0", "others/1"):
        Path(folder).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / f"{number}.png")
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_there_are_attacks() -> None:
    essential = (
        "badnets", "badnets_all_to_all", "blended", "wanet", "low_frequency", "ssba", "bpp", "adaptive_blend", "tact",
        "sig", "label_consistent", "narcissus", "input_aware", "lira",
    )  # fmt: skip
    assert {f"attack/{name}" for name in essential} <= set(ATTACKS)


#: One of each kind; the others are CI's.
QUICK = {"attack/badnets", "attack/precomputed", "attack/ssba", "attack/lira"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ATTACKS]
)
def test_attack_runs(name: str, tmp_path: Path) -> None:
    main([
        "fit", "--config", "badnets_digits", "--config", name, "--trainer.max_epochs=1", "--data.subset=400",
        "--data.test_subset=100", "--model.backbone.init_args.width=2", "--trainer.enable_progress_bar=false",
        "--data.poison.rate=" + ("0.02" if name == "attack/tact" else "0.05"), *OPTIONS.get(name, []),
    ])  # fmt: skip
    run = tmp_path / "runs" / f"badnets_digits-{Path(name).name}"
    with (run / "results.csv").open(newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert all(0 <= float(row[rate]) <= 1 for rate in ("clean_accuracy", "attack_success_rate", "robust_accuracy"))
    manifest = PoisonManifest.load(run)
    images = torch.rand(2, 1, 32, 32)
    attacked = manifest.build_trigger().attack(images)
    assert attacked.shape == images.shape
    assert not torch.equal(attacked, images)
    assert 0 <= attacked.min() <= attacked.max() <= 1
