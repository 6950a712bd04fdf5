"""Craftings in a config, as a user types them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

Command = Callable[..., Any]
Save = Callable[[Path, Tensor], None]

pytestmark = pytest.mark.usefixtures("workplace")

QUICK = (
    "--data.poison.crafting.steps=3",
    "--data.poison.crafting.robust_steps=1",
    "--data.poison.crafting.surrogate.epochs=1",
)


def short_config() -> None:
    config = yaml.safe_load(Path("small.yaml").read_text())
    del config["trainer"]["phases"]["consolidate"]
    config["trainer"]["phases"]["inject"]["max_epochs"] = 1
    Path("short.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run / "00_inject" / "final.ckpt", weights_only=True)["state_dict"]
    return found


def row(run: Path) -> dict[str, str]:
    with (run / "results.csv").open() as file:
        (found,) = csv.DictReader(file)
    return found


@pytest.mark.slow
def test_fit_on_the_poisoned_copy_equals_fit_in_memory(lightning_bd: Command, cache: Path) -> None:
    short_config()
    attack = ("--config", "short.yaml", "--config", "attack/label_consistent", *QUICK)
    outcome = lightning_bd("poison", *attack, "--output", "copy")
    assert outcome.status == 0, outcome.err
    assert len(list(cache.iterdir())) == 1
    outcome = lightning_bd("fit", *attack, "--trainer.default_root_dir", "memory")
    assert outcome.status == 0, outcome.err
    assert len(list(cache.iterdir())) == 1
    chosen = PoisonManifest.load(Path("memory")).tensors["indices.inject"]
    assert torch.equal(PoisonManifest.load(Path("copy")).tensors["indices.inject"], chosen)
    config = yaml.safe_load(Path("short.yaml").read_text())
    config["data"] = {
        "class_path": "lightning_bd.datamodules.ImageFolderDataModule",
        "init_args": {
            "root": "copy", "augment": "none", "batch_size": 64, "poison": config["data"]["init_args"]["poison"],
        },
    }  # fmt: skip
    config["trainer"]["phases"]["inject"] |= {"poisoned": False, "split": None}
    Path("disk.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    disk = ("--config", "disk.yaml", "--config", "attack/label_consistent")
    outcome = lightning_bd("fit", *disk, "--trainer.default_root_dir", "disk")
    assert outcome.status == 0, outcome.err
    mine, theirs = weights(Path("memory")), weights(Path("disk"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for column in ("clean_accuracy", "attack_success_rate"):
        assert row(Path("memory"))[column] == row(Path("disk"))[column]
    # Evaluation crafts nothing.
    for file in cache.iterdir():
        file.unlink()
    for command in ("test", "preview"):
        extra = ("--ckpt_path", "memory/00_inject/final.ckpt") if command == "test" else ()
        outcome = lightning_bd(command, *attack, *extra, "--trainer.default_root_dir", "memory")
        assert outcome.status == 0, outcome.err
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_precomputed_images(lightning_bd: Command, tmp_path: Path, save_png: Save) -> None:
    short_config()
    splits = {"inject": 0.6, "consolidate": 0.2, "defend": 0.2}
    data = DigitsDataModule(Poison(BadNets(2), mode="static"), splits, subset=300)
    for index in data.positions(("inject",)).tolist():
        image = data.train_images.read(torch.tensor([index]))[0]
        image[..., 0, :] = 255
        save_png(tmp_path / "made" / f"{index}.png", image)
    for index in range(200):
        image = data.test_images.read(torch.tensor([index]))[0]
        image[..., 0, :] = 255
        save_png(tmp_path / "test" / f"{index}.png", image)
    attack = ("--config", "short.yaml", "--config", "attack/precomputed")
    folders = ("--data.poison.crafting.folder=made", "--data.poison.crafting.test_folder=test")
    outcome = lightning_bd("fit", *attack, *folders, "--trainer.default_root_dir", "run")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "run" / "trigger.png").is_file()
    manifest = PoisonManifest.load(Path("run"))
    assert len(manifest.tensors["indices.inject"]) == 18
    model = ("--ckpt_path", "run/00_inject/final.ckpt")
    outcome = lightning_bd("test", "--config", "run/config.yaml", *model, "--data.poison.crafting.folder=nowhere")
    assert outcome.status == 0, outcome.err
    outcome = lightning_bd("test", *attack, *model)
    outcome.check_refused(["crafting.attack_images: was "])
    outcome = lightning_bd("test", "--config", "short.yaml", *model, "--data.poison=null")
    outcome.check_refused(["test images that another program made", "`test_folder`"])
    outcome = lightning_bd("fit", *attack, "--trainer.default_root_dir", "other")
    outcome.check_refused(["There is no folder", "poisoned_images"])
