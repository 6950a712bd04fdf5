"""Tiny ImageNet from generated files in the official layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bd.datamodules import TinyImageNetDataModule
from lightning_bd.image_files import read_image

WNIDS = ["n03", "n01", "n02"]


@pytest.fixture
def root(tmp_path: Path, write_image: Callable[[Path, int, int], None]) -> Path:
    """Write three classes of four training and two validation images."""
    folder = tmp_path / "tiny-imagenet-200"
    lines = []
    for row, wnid in enumerate(WNIDS):
        for number in range(4):
            write_image(folder / f"train/{wnid}/images/{wnid}_{number}.JPEG", 64, 64)
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text("")
        for number in range(2):
            name = f"val_{5 - 2 * row - number}.JPEG"
            write_image(folder / "val/images" / name, 64, 64)
            lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    (folder / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tbullfrog\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_images_and_labels_are_those_of_their_files(root: Path) -> None:
    data = TinyImageNetDataModule(root)
    folder = root / "tiny-imagenet-200"
    assert data.image_shape == (3, 64, 64)
    assert data.train_images.class_names == ("goldfish, Carassius auratus", "bullfrog", "n03")
    train, test = data.train_images, data.test_images
    expected = [(f"train/{w}/images/{w}_{i}.JPEG", label) for label, w in enumerate(sorted(WNIDS)) for i in range(4)]
    assert train.labels.tolist() == [label for _, label in expected]
    for number, (path, _) in enumerate(expected):
        assert torch.equal(train.read(torch.tensor([number]))[0], read_image(folder / path, 64))
    # val_5 and val_4 are of n03 (class 2), val_3 and val_2 of n01 (0), val_1 and val_0 of n02 (1).
    assert test.labels.tolist() == [2, 2, 0, 0, 1, 1]
    for number in range(6):
        image = read_image(folder / f"val/images/val_{5 - number}.JPEG", 64)
        assert torch.equal(test.read(torch.tensor([number]))[0], image)


def test_another_size(root: Path) -> None:
    assert TinyImageNetDataModule(root, image_size=32).train_images.image_shape == (3, 32, 32)


def test_names_the_missing_folder(tmp_path: Path) -> None:
    message = (
        f"TinyImageNetDataModule found no {tmp_path / 'tiny-imagenet-200'}. "
        r"Pass --data.root <folder that contains tiny-imagenet-200>\."
    )
    with pytest.raises(MisconfigurationException, match=message):
        TinyImageNetDataModule(tmp_path).setup()


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", "val/val_annotations.txt"])
def test_names_the_missing_file(root: Path, name: str) -> None:
    (root / "tiny-imagenet-200" / name).unlink()
    with pytest.raises(MisconfigurationException, match=f"it has no file {name}. Put the whole data set there"):
        TinyImageNetDataModule(root).setup()


def test_names_a_class_without_images(root: Path) -> None:
    (root / "tiny-imagenet-200/train/n02/images").rename(root / "gone")
    with pytest.raises(MisconfigurationException, match="there is no image in train/n02/images"):
        TinyImageNetDataModule(root).setup()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("val_0.JPEG\tn09\t0\n", "val/val_annotations.txt gives val_0.JPEG the class 'n09', which wnids.txt lacks"),
        ("val_0.JPEG\n", "val/val_annotations.txt gives val_0.JPEG the class '', which wnids.txt lacks"),
        ("\n", "val/val_annotations.txt lists no image"),
    ],
)
def test_names_broken_annotations(root: Path, content: str, why: str) -> None:
    (root / "tiny-imagenet-200/val/val_annotations.txt").write_text(content)
    with pytest.raises(MisconfigurationException, match=why):
        TinyImageNetDataModule(root).setup()


def test_names_no_classes(root: Path) -> None:
    (root / "tiny-imagenet-200/wnids.txt").write_text("\n")
    with pytest.raises(MisconfigurationException, match=r"wnids.txt lists no class"):
        TinyImageNetDataModule(root).setup()


def test_nothing_is_read_outside_the_folder(root: Path) -> None:
    annotations = root / "tiny-imagenet-200/val/val_annotations.txt"
    annotations.write_text("../../../secret.JPEG\tn01\n")
    assert TinyImageNetDataModule(root).load(train=False).paths.tolist() == ["val/images/secret.JPEG"]


def test_there_is_no_download(root: Path) -> None:
    with pytest.raises(ValueError, match="`download` to be False, since TinyImageNetDataModule has no source"):
        TinyImageNetDataModule(root, download=True)
