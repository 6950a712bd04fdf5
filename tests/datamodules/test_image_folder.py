"""Any tree of one folder per class."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_bd.datamodules import ImageFolderDataModule
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

Write = Callable[[Path, int, int], None]


@pytest.fixture
def root(tmp_path: Path, write_image: Write) -> Path:
    """Write three classes of unequal size, in several formats, with other files beside them."""
    for part, count in (("train", 8), ("test", 2)):
        for label, name in enumerate(("tulip", "aster", "rose petal")):
            for number in range(count + label):
                suffix = (".png", ".jpg", ".BMP", ".ppm")[number % 4]
                write_image(tmp_path / part / name / f"{number}{suffix}", 20, 24)
            (tmp_path / part / name / "notes.txt").write_text("none")
        (tmp_path / part / ".cache").mkdir()
        (tmp_path / part / "readme.md").write_text("none")
    return tmp_path


@pytest.mark.parametrize("part", ["train", "test"])
def test_equals_torchvision(root: Path, part: str) -> None:
    data = ImageFolderDataModule(root, image_size=20)
    images = data.train_images if part == "train" else data.test_images
    (root / part / ".cache").rmdir()
    expected = ImageFolder(root / part)
    assert images.class_names == tuple(expected.classes) == ("aster", "rose petal", "tulip")
    assert images.labels.tolist() == expected.targets
    read = images.read(torch.arange(len(images)))
    for number, (picture, _) in enumerate(expected):
        resized = picture.resize((20, 20), Image.Resampling.BILINEAR)
        assert torch.equal(read[number], torch.from_numpy(np.array(resized)).permute(2, 0, 1))


def test_the_usual_size_is_32(root: Path) -> None:
    assert ImageFolderDataModule(root).image_shape == (3, 32, 32)


def test_streamed_is_the_same(root: Path) -> None:
    poison = Poison(BadNets(), 0.5, target=1)
    streamed, held = (ImageFolderDataModule(root, 16, poison=poison, in_memory=kept) for kept in (False, True))
    assert streamed.fingerprint() == held.fingerprint()
    for one, other in zip(streamed.train_dataloader(), held.train_dataloader(), strict=True):
        for mine, theirs in zip(
            streamed.on_after_batch_transfer(one, 0), held.on_after_batch_transfer(other, 0), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_names_the_class_that_differs(root: Path) -> None:
    (root / "test/tulip").rename(root / "test/tulips")
    message = "train/ and test/ must have the same classes, but differ in tulip, tulips. Put the whole data set there"
    with pytest.raises(MisconfigurationException, match=message):
        ImageFolderDataModule(root).setup()


def test_names_the_class_without_images(root: Path) -> None:
    for file in (root / "test/rose petal").glob("[0-9]*"):
        file.unlink()
    with pytest.raises(MisconfigurationException, match=r"cannot use .*test/rose petal: it holds no image \(.jpg, "):
        ImageFolderDataModule(root).setup()


@pytest.mark.parametrize("part", ["train", "test"])
def test_names_the_missing_part(root: Path, part: str) -> None:
    (root / part).rename(root / "other")
    message = rf"found no {root / part}. Pass --data.root <folder that contains {part}>\."
    with pytest.raises(MisconfigurationException, match=message):
        ImageFolderDataModule(root).setup()


def test_refuses_a_tree_without_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(MisconfigurationException, match=r"cannot use .*train: it holds no folder per class"):
        ImageFolderDataModule(tmp_path).setup()


def test_names_a_corrupt_image(root: Path) -> None:
    (root / "train/aster/1.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"Cannot read the image .*train/aster/1.jpg: "):
        ImageFolderDataModule(root).setup()


def test_refuses_a_trigger_larger_than_the_image(root: Path) -> None:
    with pytest.raises(ValueError, match="at most the image's 16 x 16 pixels, but got 17 x 17"):
        ImageFolderDataModule(root, 16, poison=Poison(BadNets(17))).setup()


def test_refuses_splits_that_leave_a_class_out(root: Path) -> None:
    with pytest.raises(ValueError, match=r"split `b` \(0.05\) gets no image of class 0, which has 9"):
        ImageFolderDataModule(root, splits={"a": 0.95, "b": 0.05}).setup()


def test_refuses_image_size(root: Path) -> None:
    for size in (0, -4):
        with pytest.raises(ValueError, match=f"`image_size` to be a positive integer, but got {size}"):
            ImageFolderDataModule(root, image_size=size)


def test_there_is_no_download(root: Path) -> None:
    message = (
        "`download` to be False, since ImageFolderDataModule has no source .* Put the data set into `root` yourself"
    )
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(root, download=True)
