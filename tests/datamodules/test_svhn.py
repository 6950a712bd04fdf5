"""SVHN from generated files in torchvision's layout."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchvision.datasets import SVHN

from lightning_bd.datamodules import SVHNDataModule


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a data set and patch torchvision's checksums."""
    generator = np.random.default_rng(0)
    files = dict(SVHN.split_list)
    for split in ("train", "test"):
        url, name, _ = files[split]
        # The file calls the digit 0 class 10.
        labels = (np.arange(30) % 10 + 1).astype(np.uint8)[:, None]
        images = generator.integers(0, 256, (32, 32, 3, 30), dtype=np.uint8)
        scipy.io.savemat(tmp_path / name, {"X": images, "y": labels})
        files[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", files)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_equals_torchvision(root: Path, split: str) -> None:
    data = SVHNDataModule(root)
    images = data.train_images if split == "train" else data.test_images
    expected = SVHN(root, split=split)
    read = images.read(torch.arange(len(images)))
    assert len(images) == len(expected) == 30
    for number, (picture, label) in enumerate(expected):
        assert torch.equal(read[number], torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        assert int(images.labels[number]) == label
    assert sorted(set(images.labels.tolist())) == list(range(10))


def test_digits_are_not_mirrored(root: Path) -> None:
    batch = next(iter(SVHNDataModule(root).train_dataloader()))
    assert batch.crop_offsets is not None
    assert batch.flips is None


def test_another_size(root: Path) -> None:
    assert SVHNDataModule(root, image_size=16).test_images.image_shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["train_32x32.mat", "test_32x32.mat"])
def test_names_the_missing_file(root: Path, name: str) -> None:
    (root / name).unlink()
    message = f"found no {root / name}. Pass --data.root <folder that contains {name}> or --data.download true"
    with pytest.raises(MisconfigurationException, match=message):
        SVHNDataModule(root).setup()


def test_names_the_broken_file(root: Path) -> None:
    (root / "test_32x32.mat").write_bytes(b"MATLAB")
    message = r"cannot use .*test_32x32.mat: it is broken \(its checksum differs\). Remove it and pass --data.download"
    with pytest.raises(MisconfigurationException, match=message):
        SVHNDataModule(root).setup()


def test_downloads_when_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str, folder: str, filename: str, md5: str) -> None:
        asked.append(filename)

    monkeypatch.setattr("torchvision.datasets.svhn.download_url", fetch)
    SVHNDataModule(root).prepare_data()
    assert asked == []
    SVHNDataModule(root, download=True).prepare_data()
    assert asked == ["train_32x32.mat", "test_32x32.mat"]
