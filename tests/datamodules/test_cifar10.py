"""CIFAR-10 and CIFAR-100 from generated files in torchvision's layout."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_bd.datamodules import CIFAR10DataModule, CIFAR100DataModule
from lightning_bd.datamodules.images import resize

Layout = Callable[[type[CIFAR10]], Path]
MODULES = [(CIFAR10DataModule, CIFAR10, 10), (CIFAR100DataModule, CIFAR100, 100)]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Return a function that writes a data set and patches torchvision's checksums."""

    def write(reader: type[CIFAR10]) -> Path:
        folder = tmp_path / reader.base_folder
        folder.mkdir()
        generator = np.random.default_rng(0)
        hundred = reader is CIFAR100
        classes = 100 if hundred else 10

        def dump(name: str, content: dict[str, object]) -> str:
            (folder / name).write_bytes(pickle.dumps(content))
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        def part(name: str) -> list[str]:
            data = generator.integers(0, 256, (2 * classes, 3072), dtype=np.uint8)
            labels = generator.permutation(np.arange(2 * classes) % classes).tolist()
            return [name, dump(name, {"data": data, ("fine_labels" if hundred else "labels"): labels})]

        for name in ("train_list", "test_list"):
            monkeypatch.setattr(reader, name, [part(file) for file, _ in getattr(reader, name)])
        names = [f"class {label}" for label in range(classes)]
        checksum = dump(reader.meta["filename"], {reader.meta["key"]: names})
        monkeypatch.setattr(reader, "meta", reader.meta | {"md5": checksum})
        return tmp_path

    return write


@pytest.mark.parametrize(("kind", "reader", "classes"), MODULES)
@pytest.mark.parametrize("train", [True, False])
def test_equals_torchvision(
    layout: Layout, kind: type[CIFAR10DataModule], reader: type[CIFAR10], classes: int, train: bool
) -> None:
    root = layout(reader)
    data = kind(root)
    images = data.train_images if train else data.test_images
    expected = reader(root, train=train)
    assert len(images) == len(expected)
    read = images.read(torch.arange(len(images)))
    assert read.dtype == torch.uint8
    for number in range(0, len(expected), 7):
        picture, label = expected[number]
        assert torch.equal(read[number], torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        assert int(images.labels[number]) == label
    assert (data.num_classes, data.image_shape) == (classes, (3, 32, 32))
    assert images.class_names[3] == "class 3"
    assert data.augment == "crop_flip"


def test_another_size_is_resized_once(layout: Layout) -> None:
    root = layout(CIFAR10)
    small, usual = CIFAR10DataModule(root, image_size=16), CIFAR10DataModule(root)
    assert small.image_shape == (3, 16, 16)
    everything = torch.arange(len(usual.test_images))
    assert torch.equal(small.test_images.read(everything), resize(usual.test_images.read(everything), 16))


def test_common_arguments_reach_the_loaders(layout: Layout) -> None:
    data = CIFAR10DataModule(layout(CIFAR10), splits={"a": 0.5, "b": 0.5}, batch_size=16, subset=40, augment="crop")
    batch = next(iter(data.train_dataloader()))
    assert len(data.train_images) == 40
    assert len(data.positions(("a",))) == 20
    assert len(batch) == 16
    assert batch.crop_offsets is not None
    assert batch.flips is None


@pytest.mark.parametrize(("kind", "reader", "classes"), MODULES)
def test_names_the_missing_folder(
    tmp_path: Path, kind: type[CIFAR10DataModule], reader: type[CIFAR10], classes: int
) -> None:
    folder = reader.base_folder
    message = (
        f"{kind.__name__} found no {tmp_path / 'data' / folder}. Pass --data.root <folder that contains {folder}> or "
        "--data.download true"
    )
    with pytest.raises(MisconfigurationException, match=message):
        kind(tmp_path / "data").setup()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("content", [None, b"other"])
def test_names_the_broken_file(layout: Layout, name: str, content: bytes | None) -> None:
    root = layout(CIFAR10)
    path = root / "cifar-10-batches-py" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MisconfigurationException, match=f"its file {name} is missing or broken .* Remove it and pass"):
        CIFAR10DataModule(root).setup()


def test_a_hostile_pickle_is_not_run(layout: Layout, tmp_path: Path) -> None:
    root = layout(CIFAR10)
    trace = tmp_path / "trace"
    # Protocol 0: call pathlib.Path(trace).touch via builtins.exec.
    code = f"import pathlib; pathlib.Path({str(trace)!r}).touch()"
    hostile = f"cbuiltins\nexec\n(V{code}\ntR.".encode()
    pickle.loads(hostile)
    assert trace.exists()
    trace.unlink()
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(hostile)
    with pytest.raises(MisconfigurationException, match="its file data_batch_1 is missing or broken"):
        CIFAR10DataModule(root).setup()
    assert not trace.exists()


@pytest.mark.parametrize("download", [True, False])
def test_downloads_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, download: bool) -> None:
    asked: list[tuple[str, str]] = []

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, str(root)))

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    data = CIFAR10DataModule(tmp_path, download=download)
    if download:
        # Torchvision looks again after the download, and nothing was fetched here.
        with pytest.raises(RuntimeError, match="not found or corrupted"):
            data.prepare_data()
    else:
        data.prepare_data()
    assert asked == ([(CIFAR10.url, str(tmp_path))] if download else [])
