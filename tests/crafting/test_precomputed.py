"""Images made elsewhere: a static poison, written to files, comes back bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_bd.batch import Sample
from lightning_bd.crafting import PrecomputedPoison
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule, PhaseData
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets, Blended

Finish = Callable[[ImageDataModule, BatchLoader], Sample]
Save = Callable[[Path, Tensor], None]

PHASE = PhaseData("inject", ("a",), "static")


def digits(poison: Poison, **arguments: Any) -> DigitsDataModule:
    data = DigitsDataModule(
        poison, **{"splits": {"a": 0.6, "b": 0.4}, "subset": 300, "augment": "crop", "seed": 1, **arguments}
    )
    data.set_phase(PHASE)
    return data


def rule(crafting: PrecomputedPoison | None = None, **arguments: Any) -> Poison:
    return Poison(BadNets(2, pattern="white"), **{"rate": 0.1, "mode": "static", "crafting": crafting, **arguments})


def epoch(data: ImageDataModule) -> list[tuple[Tensor, ...]]:
    return [tuple(data.on_after_batch_transfer(raw, 0)) for raw in data.train_dataloader()]


@pytest.fixture
def poisoned(tmp_path: Path, finished: Finish, save_png: Save) -> Path:
    """Write the poisoned images of the static rule, and nothing else, into folders of their own making."""
    data = digits(rule())
    sample = finished(data, data.stored_dataloader(PHASE))
    assert int(sample.is_poisoned.sum()) == 18
    for row in sample.is_poisoned.nonzero().flatten().tolist():
        index = int(sample.index[row])
        name = f"{index:05d}.png" if index % 2 else f"odd/{index}.PNG"
        save_png(tmp_path / "made" / name, (sample.image[row] * 255).round().to(torch.uint8))
    (tmp_path / "made" / "notes.txt").write_text("not an image")
    (tmp_path / "made" / "._7.png").write_text("of another system")
    return tmp_path / "made"


def test_training_is_that_of_the_static_poison(poisoned: Path) -> None:
    expected, got = epoch(digits(rule())), epoch(digits(rule(PrecomputedPoison(poisoned))))
    assert len(got) == len(expected) == 2
    for mine, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_a_trained_model_is_that_of_the_static_poison(poisoned: Path) -> None:
    weights = []
    for crafting in (None, PrecomputedPoison(poisoned)):
        model = torch.nn.Linear(64, 10)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for image, label, *_ in epoch(digits(rule(crafting))):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(image.flatten(1)), label).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        weights.append(model.weight.detach())
    assert weights[0].abs().sum() > 0
    assert torch.equal(*weights)


def test_rate_chooses_among_what_is_there(poisoned: Path, finished: Finish) -> None:
    there = {int(path.stem) for path in poisoned.rglob("*.*") if path.suffix.lower() == ".png" and path.name[0] != "."}
    data = digits(rule(PrecomputedPoison(poisoned), rate=0.05))
    sample = finished(data, data.stored_dataloader(PHASE))
    chosen = set(sample.index[sample.is_poisoned].tolist())
    assert len(chosen) == 9
    assert chosen < there
    narrow = digits(rule(PrecomputedPoison(poisoned), rate=0.01, selection=sorted(there)[:1]))
    sample = finished(narrow, narrow.stored_dataloader(PHASE))
    assert sample.index[sample.is_poisoned].tolist() == sorted(there)[:1]


def test_images_are_final_and_labels_follow_the_rule(tmp_path: Path, finished: Finish, save_png: Save) -> None:
    data = digits(rule())
    positions = data.positions(("a",))
    threes = positions[data.train_images.labels[positions] == 3]
    for index in threes.tolist():
        save_png(tmp_path / f"{index}.png", torch.full((1, 8, 8), 100, dtype=torch.uint8))
    for clean_label, target in ((True, 3), (False, 5)):
        poison = rule(PrecomputedPoison(tmp_path), rate=0.02, clean_label=clean_label, target=target, cover_rate=0.1)
        if clean_label:
            poison = rule(PrecomputedPoison(tmp_path), rate=0.5, clean_label=True, target=target)
        data = digits(poison)
        sample = finished(data, data.stored_dataloader(PHASE))
        hit = sample.is_poisoned
        assert int(hit.sum()) == (int(0.5 * len(threes)) if clean_label else 3)
        assert (sample.original_label[hit] == 3).all()
        assert (sample.label[hit] == target).all()
        # No white trigger on top.
        assert ((sample.image[hit] * 255).round() == 100).all()
        changed = (sample.image * 255).round() != data.train_images.read(sample.index)
        covers = changed.flatten(1).any(1) & ~hit
        assert (int(covers.sum()) > 0) is not clean_label
        assert (sample.image[covers][..., -2:, -2:] == 1).all()


@pytest.fixture
def attacked(tmp_path: Path, save_png: Save) -> Path:
    """Write test images for half of the test set, the target class among them."""
    data = DigitsDataModule()
    for index in range(0, len(data.test_images), 2):
        save_png(tmp_path / "test" / f"{index}.png", torch.full((1, 8, 8), index % 256, dtype=torch.uint8))
    return tmp_path / "test"


def test_the_attack_test_set(poisoned: Path, attacked: Path, finished: Finish) -> None:
    data = digits(rule(PrecomputedPoison(poisoned, attacked)))
    clean, attack = data.test_dataloader()
    sample = finished(data, attack)
    labels = data.test_images.labels
    expected = [index for index in range(0, len(labels), 2) if labels[index] != 0]
    assert sample.index.tolist() == expected
    assert ((sample.image * 255).round().flatten(1) == (sample.index % 256)[:, None]).all()
    assert (sample.label == 0).all()
    assert sample.is_poisoned.all()
    assert torch.equal(sample.original_label, labels[sample.index])
    assert len(clean.positions) == len(labels)
    assert torch.equal(finished(data, clean).image * 255, data.test_images.read(torch.arange(len(labels))).float())
    # Without a folder the trigger makes it, of every victim.
    other = digits(rule(PrecomputedPoison(poisoned)))
    sample = finished(other, other.test_dataloader()[1])
    assert len(sample.index) == int((labels != 0).sum())
    assert (sample.image[..., -2:, -2:] == 1).all()


def test_validation_images_are_not_attacked(poisoned: Path, attacked: Path) -> None:
    """Those made elsewhere are of the test set."""
    splits = {"a": 0.6, "val": 0.4}
    assert len(digits(rule(PrecomputedPoison(poisoned, attacked)), splits=splits).val_dataloader()) == 1
    assert len(digits(rule(PrecomputedPoison(poisoned)), splits=splits).val_dataloader()) == 2


def test_no_victim_among_the_test_images(poisoned: Path, tmp_path: Path, save_png: Save) -> None:
    labels = DigitsDataModule().test_images.labels
    index = int((labels == 0).nonzero()[0])
    save_png(tmp_path / "test" / f"{index}.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    data = digits(rule(PrecomputedPoison(poisoned, tmp_path / "test")))
    with pytest.raises(ValueError, match="test images that the attack aims at, but the poison has no victim there"):
        data.test_dataloader()


class Colours(ImageDataModule):
    """Thirty images in three channels."""

    def load(self, train: bool) -> TensorImages:
        images = torch.zeros(30, 3, 8, 6, dtype=torch.uint8)
        return TensorImages(images, torch.arange(30) % 3, ("a", "b", "c"))


def test_channels_and_sides_keep_their_places(tmp_path: Path, finished: Finish, save_png: Save) -> None:
    image = torch.arange(3 * 8 * 6, dtype=torch.uint8).view(3, 8, 6)
    save_png(tmp_path / "4.png", image)
    data = Colours(Poison(Blended(), 0.04, mode="static", crafting=PrecomputedPoison(tmp_path)), augment="none")
    sample = finished(data, data.train_dataloader())
    assert sample.is_poisoned.nonzero().flatten().tolist() == [4]
    assert torch.equal((sample.image[4] * 255).round().to(torch.uint8), image)


def test_too_few_images(poisoned: Path) -> None:
    with pytest.raises(
        ValueError, match=r"at least 36 images .* only 18 may be poisoned; .*made holds 18 images\. Lower"
    ):
        epoch(digits(rule(PrecomputedPoison(poisoned), rate=0.2)))
    other = PhaseData("inject", ("b",), "static")
    data = DigitsDataModule(rule(PrecomputedPoison(poisoned)), splits={"a": 0.6, "b": 0.4}, subset=300)
    with pytest.raises(ValueError, match=r"split `b`, but rate 0.1 .* \(0 may be poisoned; .*made holds 18 images\)"):
        data.set_phase(other)


def check_refused(match: str, folder: Path, kind: type[Exception] = ValueError, **arguments: Any) -> None:
    with pytest.raises(kind, match=match):
        epoch(digits(rule(PrecomputedPoison(folder), rate=0.01), **arguments))


def test_bad_folders(tmp_path: Path, save_png: Save) -> None:
    check_refused(r"no folder .*nowhere of poisoned images: put files .* crafting's `folder`", tmp_path / "nowhere",
                  FileNotFoundError)  # fmt: skip
    (tmp_path / "a.jpg").write_text("")
    check_refused("`folder` to be a folder of images .* holds no PNG file. Other formats are not read", tmp_path)
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    save_png(tmp_path / "cat.png", image)
    check_refused(r"named `<index>.png` by the position .* found .*cat.png. Rename or remove it", tmp_path)
    (tmp_path / "cat.png").rename(tmp_path / "12.png")
    save_png(tmp_path / "more" / "0012.png", image)
    check_refused(r"one image per position, but .*12.png and .*0012.png are two", tmp_path)
    (tmp_path / "more" / "0012.png").rename(tmp_path / "300.png")
    check_refused(r"300.png is named by position 300, but there are only 300 training images \(after `data.subset`\)",
                  tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("L", (9, 8)), "to be 8 x 8 pixels of mode L .* but it is 9 x 8 of mode L"),
        (Image.new("RGB", (8, 8)), "but it is 8 x 8 of mode RGB. Poisoned images are used as they are"),
        (Image.fromarray(np.zeros((8, 8), dtype=np.uint16)), "but it is 8 x 8 of mode I;16"),
    ],
)
def test_bad_images(tmp_path: Path, picture: Image.Image, message: str) -> None:
    for index in range(300):
        picture.save(tmp_path / f"{index}.png")
    check_refused(message, tmp_path)


def test_broken_images(tmp_path: Path) -> None:
    for index in range(300):
        (tmp_path / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    check_refused(r"Cannot read the image .*\.png: .* Make it anew", tmp_path)


def test_bad_test_folders(poisoned: Path, tmp_path: Path, save_png: Save) -> None:
    data = digits(rule(PrecomputedPoison(poisoned, tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="crafting's `test_folder`"):
        data.test_dataloader()
    save_png(tmp_path / "test" / "359.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    data = digits(rule(PrecomputedPoison(poisoned, tmp_path / "test")))
    with pytest.raises(
        ValueError, match=r"position 359, but there are only 359 test images \(after `data.test_subset`\)"
    ):
        data.test_dataloader()


def test_nothing_is_looked_at_to_evaluate(tmp_path: Path) -> None:
    data = DigitsDataModule(rule(PrecomputedPoison(tmp_path / "nowhere")))
    assert len(data.test_dataloader()) == 2
    manifest = data.manifest()
    assert manifest is not None
    assert manifest.crafting == {"class": "PrecomputedPoison", "arguments": {}, "attack_images": None}


def test_evaluation_reads_in_inference_mode(poisoned: Path, attacked: Path, finished: Finish) -> None:
    data = digits(rule(PrecomputedPoison(poisoned, attacked)))
    with torch.inference_mode():
        first = finished(data, data.test_dataloader()[1])
        data.stored_dataloader(PHASE)
    again = finished(data, data.test_dataloader()[1])
    assert torch.equal(first.image, again.image)
    assert sum(int(batch[2].sum()) for batch in epoch(data)) == 18
