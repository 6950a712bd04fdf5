"""Every shipped config runs, shortened: generated images in the data set's layout, a tiny network, one epoch."""

import csv
import hashlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import models
from torchvision.datasets import CIFAR10

from lightning_bd.cli import main
from lightning_bd.config_files import shipped_configs

CONFIGS = shipped_configs()
Write = Callable[[Path, pytest.MonkeyPatch], None]


def picture(generator: np.random.Generator, size: int = 32) -> np.ndarray:
    return generator.integers(0, 256, (size, size, 3), dtype=np.uint8)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python pickles of five training batches and a test batch, and torchvision's checksums of them."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def dump(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def part(name: str, each: int) -> list[str]:
        data = generator.integers(0, 256, (10 * each, 3072), dtype=np.uint8)
        return [name, dump(name, {"data": data, "labels": [label % 10 for label in range(10 * each)]})]

    for name, each in (("train_list", 8), ("test_list", 2)):
        monkeypatch.setattr(CIFAR10, name, [part(file, each) for file, _ in getattr(CIFAR10, name)])
    checksum = dump(CIFAR10.meta["filename"], {CIFAR10.meta["key"]: [f"class {label}" for label in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksum})


def write_image_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder per class for training and for testing."""
    generator = np.random.default_rng(0)
    for part, each in (("train", 20), ("test", 2)):
        for label in range(10):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(each):
                Image.fromarray(picture(generator)).save(folder / f"{number}.png")


def write_gtsrb(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """43 folders of training signs; test signs with a table of their classes."""
    generator = np.random.default_rng(0)
    base = root / "gtsrb"
    training, test = base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    rows = []
    for label in range(43):
        (training / f"{label:05d}").mkdir(parents=True)
        for number in range(12):
            Image.fromarray(picture(generator, 24)).save(training / f"{label:05d}" / f"{number}.ppm")
        Image.fromarray(picture(generator, 30)).save(test / f"{label:05d}.ppm")
        rows.append(f"{label:05d}.ppm;30;30;1;1;9;9;{label}\n")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    (base / "GT-final_test.csv").write_text(header + "".join(rows))


def write_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images come with a dependency."""


WRITERS: dict[str, Write] = {
    "CIFAR10DataModule": write_cifar10,
    "DigitsDataModule": write_nothing,
    "GTSRBDataModule": write_gtsrb,
    "ImageFolderDataModule": write_image_folder,
}


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    # Lightning 2.6 calls methods that jsonargparse 4.49 renamed.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_there_are_configs() -> None:
    assert {"sbl_digits", "sbl_cifar10", "sbl_gtsrb", "badnets_cifar10", "sbl_cifar10_small"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
# Defenses cannot keep an accuracy that there is not, and one epoch of images without meaning has none to keep.
@pytest.mark.filterwarnings("ignore:Fine-tuning lost more than")
# A shortened EWC phase is not the recipe's.
@pytest.mark.filterwarnings("ignore:.*ElasticWeightConsolidation")
def test_config_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    data = config["data"]["class_path"].rpartition(".")[2]
    classes, channels = config["model"]["num_classes"], 1 if data == "DigitsDataModule" else 3
    WRITERS[data](tmp_path / "images", monkeypatch)
    options = ["--data.subset=300"] if data == "DigitsDataModule" else [f"--data.root={tmp_path / 'images'}"]
    if data == "ImageFolderDataModule":
        options += ["--data.subset=200", "--data.test_subset=null"]
    if splits := config["data"]["init_args"].get("splits"):
        # Few images: each split needs some of each class.
        options.append(f"--data.splits={ {split: 1 / len(splits) for split in splits} }")
    tiny = {"num_classes": classes, "in_channels": channels, "width": 2}
    if name == "wicked_oddities_cifar10":
        (tmp_path / "weights").mkdir()
        # Any weights of that architecture; at their 224 pixels a few images already take seconds.
        torch.save(models.resnet50().state_dict(), tmp_path / "weights" / "resnet50.pth")
        scorer = "--data.poison.selection.init_args"
        options += [f"{scorer}.k=2", f"{scorer}.encoder.init_args.image_size=32"]
    if name == "wicked_oddities_cifar10_small":
        options.append("--data.poison.selection.init_args.surrogate.init_args.epochs=1")
    main([
        "fit", "--config", name, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", *options,
        "--model.backbone=lightning_bd.backbones.small_cnn",
        *(f"--model.backbone.init_args.{option}={value}" for option, value in tiny.items()),
    ])  # fmt: skip
    run = tmp_path / "runs" / name
    with (run / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["phase"]: row for row in csv.DictReader(file)}
    phases = config["trainer"]["phases"]
    assert list(rows) == list(phases)
    for phase, row in rows.items():
        assert int(row["epochs"]) == 1, phase
        assert row["start_from"] == phases[phase].get("start_from", row["start_from"])
        assert all(0 <= float(row[rate]) <= 1 for rate in ("clean_accuracy", "attack_success_rate", "robust_accuracy"))
        assert len(list(run.glob(f"*_{phase}/tensorboard/events*"))) > 0
    assert (run / "trigger.png").is_file()
    assert (run / "manifest.json").is_file()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_real_config_is_accepted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parse and build everything with the recipe's own backbone; only the data is missing."""
    config = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    if config["data"]["class_path"].endswith("DigitsDataModule"):
        return
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", name, "--data.root=nowhere"])
    assert left.value.code == 2
    assert "found no" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
