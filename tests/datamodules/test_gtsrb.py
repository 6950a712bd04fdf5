"""GTSRB from generated files in torchvision's layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.datasets import GTSRB

from lightning_bd.datamodules import GTSRBDataModule

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


@pytest.fixture
def root(tmp_path: Path, write_image: Callable[[Path, int, int], None]) -> Path:
    """Write 43 classes of two training images and one test image, each of its own size."""
    base = tmp_path / "gtsrb"
    rows = []
    for label in range(43):
        for number in range(2):
            write_image(base / f"GTSRB/Training/{label:05d}/0000{number}_00000.ppm", 15 + label, 16 + number)
        name = f"{(7 * label) % 43:05d}.ppm"
        write_image(base / "GTSRB/Final_Test/Images" / name, 32, 20 + label)
        rows.append(f"{name};20;32;1;1;9;9;{label}\n")
    (base / "GT-final_test.csv").write_text(HEADER + "".join(rows))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_equals_torchvision(root: Path, split: str) -> None:
    data = GTSRBDataModule(root)
    images = data.train_images if split == "train" else data.test_images
    expected = GTSRB(root, split=split)
    assert len(images) == len(expected) == (86 if split == "train" else 43)
    read = images.read(torch.arange(len(images)))
    for number, (picture, label) in enumerate(expected):
        resized = picture.resize((32, 32), Image.Resampling.BILINEAR)
        assert torch.equal(read[number], torch.from_numpy(np.array(resized)).permute(2, 0, 1))
        assert int(images.labels[number]) == label
    assert data.num_classes == 43


def test_streamed_is_the_same(root: Path) -> None:
    streamed, held = GTSRBDataModule(root, in_memory=False), GTSRBDataModule(root)
    assert type(streamed.train_images) is not type(held.train_images)
    assert streamed.fingerprint() == held.fingerprint()
    for one, other in zip(streamed.train_dataloader(), held.train_dataloader(), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_subset_is_taken_before_decoding(root: Path) -> None:
    images = GTSRBDataModule(root).load(train=True)
    for path in images.paths.tolist():
        (root / path).write_bytes(b"broken")
    data = GTSRBDataModule(root, subset=43)
    with pytest.raises(ValueError, match="Cannot read the image"):
        data.setup()
    assert len(GTSRBDataModule(root, subset=43, in_memory=False).train_images) == 43


def test_signs_are_not_mirrored(root: Path) -> None:
    batch = next(iter(GTSRBDataModule(root).train_dataloader()))
    assert batch.crop_offsets is not None
    assert batch.flips is None


@pytest.mark.parametrize("path", ["gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"])
def test_names_what_is_missing(root: Path, path: str) -> None:
    (root / path).rename(root / "elsewhere")
    message = f"found no {root / path}. Pass --data.root <folder that contains {path}> or --data.download true"
    with pytest.raises(MisconfigurationException, match=message):
        GTSRBDataModule(root).setup()


def test_names_a_class_without_images(root: Path) -> None:
    for file in (root / "gtsrb/GTSRB/Training/00017").iterdir():
        file.unlink()
    with pytest.raises(MisconfigurationException, match=r"there is no image of class 17 in 00017/. Remove it and pass"):
        GTSRBDataModule(root).setup()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("00000.ppm;1;1;1;1;1;1;red\n", "a row lacks its Filename or ClassId .*red"),
        ("00000.ppm\n", "a row lacks its Filename or ClassId"),
        ("", "it lists no image"),
    ],
)
def test_names_a_broken_table(root: Path, rows: str, why: str) -> None:
    (root / "gtsrb/GT-final_test.csv").write_text(HEADER + rows)
    with pytest.raises(MisconfigurationException, match=rf"cannot use .*GT-final_test.csv: {why}"):
        GTSRBDataModule(root).setup()


def test_names_a_corrupt_image(root: Path) -> None:
    (root / "gtsrb/GTSRB/Training/00004/00001_00000.ppm").write_bytes(b"P6\n")
    with pytest.raises(ValueError, match=r"Cannot read the image .*00004/00001_00000.ppm: "):
        GTSRBDataModule(root).setup()


def test_names_a_listed_image_that_is_missing(root: Path) -> None:
    (root / "gtsrb/GTSRB/Final_Test/Images/00007.ppm").unlink()
    with pytest.raises(ValueError, match=r"Cannot read the image .*Images/00007.ppm: "):
        GTSRBDataModule(root).setup()


def test_downloads_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str, download_root: str, md5: str) -> None:
        asked.append(url.rsplit("/", 1)[1])
        (tmp_path / "gtsrb/GTSRB" / ("Training" if "Training" in url else "Final_Test/Images")).mkdir(
            parents=True, exist_ok=True
        )
        (tmp_path / "gtsrb/GTSRB/Training/00000").mkdir(exist_ok=True)
        (tmp_path / "gtsrb/GTSRB/Training/00000/0.ppm").touch()
        (tmp_path / "gtsrb/GT-final_test.csv").touch()

    monkeypatch.setattr("torchvision.datasets.gtsrb.download_and_extract_archive", fetch)
    GTSRBDataModule(tmp_path).prepare_data()
    assert asked == []
    GTSRBDataModule(tmp_path, download=True).prepare_data()
    assert asked == ["GTSRB-Training_fixed.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip"]
