"""Any tree of one folder per class."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_bd.datamodules import ImageFolderDataModule
from lightning_bd.datamodules.image_tree import ImageTreeWriter, folder_names
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


@pytest.fixture
def ordered(tmp_path: Path) -> Path:
    """Write eight grey images whose order is not that of their names."""
    writer = ImageTreeWriter(tmp_path / "tree", ("b", "a"), (1, 6, 6))
    for part in ("train", "test"):
        images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 6, 6)
        writer.add(part, images, torch.tensor([1, 0, 1, 0]), torch.tensor([2, 9, 1, 0]))
    writer.finish()
    return tmp_path / "tree"


def test_reads_a_written_tree_in_its_order(ordered: Path) -> None:
    data = ImageFolderDataModule(ordered)
    assert data.image_shape == (1, 6, 6)
    assert data.image_size == 6
    assert data.train_images.class_names == ("0_b", "1_a")
    for images in (data.train_images, data.test_images):
        assert images.image_shape == (1, 6, 6)
        assert images.labels.tolist() == [1, 0, 1, 0]
        assert images.read(torch.arange(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    streamed = ImageFolderDataModule(ordered, in_memory=False)
    chosen = streamed.train_images.select(torch.tensor([2, 0]))
    assert chosen.read(torch.arange(2))[:, 0, 5, 5].tolist() == [2, 0]
    assert chosen.image_shape == (1, 6, 6)
    assert streamed.fingerprint() == data.fingerprint()
    assert ImageFolderDataModule(ordered, image_size=12).image_shape == (1, 12, 12)
    (ordered / "images.json").unlink()
    plain = ImageFolderDataModule(ordered)
    assert plain.image_shape == (3, 32, 32)
    assert plain.train_images.labels.tolist() == [0, 0, 1, 1]


def test_refuses_a_tree_that_is_not_the_listed_one(ordered: Path) -> None:
    order, stray = ordered / "images.json", ordered / "train" / "0_b" / "x.png"
    found = json.loads(order.read_text())
    files = found["train"]
    for text, message in (
        (json.dumps({**found, "train": [*files, "1_a/7.png"]}), "train/1_a/7.png is not there .*; 1 such files"),
        (json.dumps({**found, "train": ["../x.png"]}), "train/../x.png is not there"),
        (json.dumps({**found, "train": files * 2}), "it names a file of train/ twice"),
        (json.dumps({**found, "test": [1]}), "no list of files `test`"),
        (json.dumps([]), "no list of files `train`"),
        (json.dumps({**found, "image_shape": [1, 6, 7]}), r"no valid `image_shape`, but \[1, 6, 7\]"),
        (json.dumps({**found, "image_shape": [1, 10**6, 10**6]}), "no valid `image_shape`"),
        (json.dumps({**found, "image_shape": None}), "no valid `image_shape`, but None"),
        ("{", "order of the images cannot be read: .* Restore it, or remove it"),
    ):
        order.write_text(text)
        with pytest.raises(MisconfigurationException, match=message):
            ImageFolderDataModule(ordered).setup()
    order.write_text(json.dumps(found))
    stray.touch()
    with pytest.raises(MisconfigurationException, match=r"train/0_b/x.png is not in the list .*; 1 such files"):
        ImageFolderDataModule(ordered).setup()


def test_refuses_a_tree_that_was_not_written_to_its_end(ordered: Path) -> None:
    (ordered / "INCOMPLETE").touch()
    with pytest.raises(MisconfigurationException, match="it was not written to its end, and has a file INCOMPLETE"):
        ImageFolderDataModule(ordered).setup()


def test_names_of_folders_keep_the_order_of_classes() -> None:
    for names, expected in (
        (("a", "b c"), ["a", "b c"]),
        (("b", "a"), ["0_b", "1_a"]),
        (("a", "a/b"), ["0_a", "1_a_b"]),
        (("A", "a"), ["0_A", "1_a"]),
        ((".a", "b"), ["0__a", "1_b"]),
        (("", "b"), ["0_", "1_b"]),
        (("x" * 300, "y"), ["0_" + "x" * 100, "1_y"]),
    ):
        assert folder_names(names) == expected
        assert sorted(folder_names(names)) == expected
    assert folder_names([str(label) for label in range(11)])[-1] == "10_10"
