"""Test sets of other images: what is read, in what order, and who finishes the batches."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import Tensor, nn

from lightning_bd.batch import Sample
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.datamodules.ood import OODDataModule, ood_loader
from lightning_bd.datamodules.unlabelled import JpegImages, UnlabelledImages, find_images
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

# Lightning 2.6 on torch 2.15.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

Write = Callable[[Path, int, int], None]


class Colours(ImageDataModule):
    """Random colour images, wider than high."""

    def load(self, train: bool) -> TensorImages:
        """Return 40 images."""
        generator = torch.Generator().manual_seed(int(train))
        images = torch.randint(0, 256, (40, 3, 6, 10), dtype=torch.uint8, generator=generator)
        return TensorImages(images, torch.arange(40) % 4, "abcd")


@pytest.fixture
def folders(tmp_path: Path, write_image: Write) -> dict[str, Path]:
    """Return a nested folder of 23 images with other files beside them, and a flat one of 7."""
    for number in range(20):
        write_image(tmp_path / "letters" / "abc"[number % 3] / f"{number:02d}.png", 6 + number % 2 * 8, 10)
    for name in ("deep/er/x.JPG", "first.bmp", "deep/y.ppm"):
        write_image(tmp_path / "letters" / name, 9, 9)
    for name in (".cache/hidden.png", "a/._00.png"):
        write_image(tmp_path / "letters" / name, 9, 9)
    (tmp_path / "letters" / "notes.txt").write_text("none")
    for number in range(7):
        write_image(tmp_path / "noise" / f"{number}.png", 6, 10)
    return {"letters": tmp_path / "letters", "noise": tmp_path / "noise"}


def make(
    folders: dict[str, Path],
    id: ImageDataModule | None = None,
    max_images: int | None = None,
    jpeg_quality: int | None = None,
    batch_size: int | None = 4,
) -> OODDataModule:
    near, far = {"letters": str(folders["letters"])}, {"noise": str(folders["noise"])}
    return OODDataModule(id or Colours(batch_size=16), near, far, batch_size, max_images, jpeg_quality)


def finished(data: OODDataModule | ImageDataModule, loader: BatchLoader) -> Sample:
    samples = [cast(Sample, data.on_after_batch_transfer(batch, 0)) for batch in loader]
    return Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))


def by_pillow(path: Path, mode: str = "RGB", size: tuple[int, int] = (10, 6), quality: int | None = None) -> Tensor:
    """Return what the model should see of a file; ``size`` is width and height."""
    image = Image.open(path).convert(mode).resize(size, Image.Resampling.BILINEAR)
    if quality is not None:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        image = Image.open(file)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return torch.from_numpy(pixels.reshape(size[1], size[0], -1)).permute(2, 0, 1)


def files_of(folder: Path) -> list[Path]:
    return [folder / name for name in find_images(folder)]


def test_sets_come_in_the_order_of_their_names(folders: dict[str, Path]) -> None:
    data = make(folders)
    assert data.test_set_names == ["id", "letters", "noise"]
    assert (data.near_names, data.far_names) == (["letters"], ["noise"])
    loaders = data.test_dataloader()
    assert [len(loader.positions) for loader in loaders] == [40, 23, 7]
    assert [len(next(iter(loader))) for loader in loaders] == [4, 4, 4]
    assert [len(next(iter(loader))) for loader in make(folders, batch_size=None).test_dataloader()] == [14, 12, 7]


def test_the_data_set_is_its_clean_test_set(folders: dict[str, Path]) -> None:
    source = DigitsDataModule(Poison(BadNets(size=2), 0.1), seed=0)
    data = make(folders, source, batch_size=None)
    found = finished(data, data.test_dataloader()[0])
    for mine, theirs in zip(found, finished(source, source.test_dataloader()[0]), strict=True):
        assert torch.equal(mine, theirs)
    found = finished(data, data.clean_fit_dataloader())
    for mine, theirs in zip(found, finished(source, source.clean_fit_dataloader()), strict=True):
        assert torch.equal(mine, theirs)


def test_files_are_found_in_all_folders_and_sorted(folders: dict[str, Path]) -> None:
    found = find_images(folders["letters"])
    assert found == sorted(found)
    assert len(found) == 23
    assert {"deep/er/x.JPG", "first.bmp", "deep/y.ppm", "a/00.png"} <= set(found)
    assert not any("hidden" in name or "._" in name for name in found)


@pytest.mark.parametrize("quality", [None, 30])
def test_images_are_resized_and_converted_as_pillow_does(folders: dict[str, Path], quality: int | None) -> None:
    data = make(folders, jpeg_quality=quality)
    found = finished(data, data.test_dataloader()[1])
    expected = torch.stack([by_pillow(file, quality=quality) for file in files_of(folders["letters"])])
    assert torch.equal(found.image, expected)
    assert found.index.tolist() == list(range(23))
    assert (found.label == -1).all()
    assert (found.original_label == -1).all()
    assert not found.is_poisoned.any()


@pytest.mark.parametrize("quality", [None, 30])
def test_a_grey_data_set_makes_them_grey(folders: dict[str, Path], quality: int | None) -> None:
    data = make(folders, DigitsDataModule(), jpeg_quality=quality)
    found = finished(data, data.test_dataloader()[2])
    expected = torch.stack([by_pillow(file, "L", (8, 8), quality) for file in files_of(folders["noise"])])
    assert found.image.shape == (7, 1, 8, 8)
    assert torch.equal(found.image, expected)


def test_jpeg_changes_all_test_images_and_no_other(folders: dict[str, Path]) -> None:
    plain, stored = make(folders), make(folders, jpeg_quality=50)
    for one, other in zip(plain.test_dataloader(), stored.test_dataloader(), strict=True):
        before, after = finished(plain, one), finished(stored, other)
        assert (before.image != after.image).flatten(1).any(1).all()
        assert torch.equal(before.index, after.index)
        assert torch.equal(before.label, after.label)
    fit = [finished(data, data.clean_fit_dataloader()).image for data in (plain, stored)]
    assert torch.equal(*fit)


def test_max_images_are_spread_evenly(folders: dict[str, Path]) -> None:
    data = make(folders, max_images=5)
    near, far = (finished(data, loader) for loader in data.test_dataloader()[1:])
    assert near.index.tolist() == [0, 4, 9, 13, 18]
    assert far.index.tolist() == [0, 1, 2, 4, 5]
    files = files_of(folders["letters"])
    assert torch.equal(near.image, torch.stack([by_pillow(files[place]) for place in near.index.tolist()]))
    assert len(make(folders, max_images=1000).test_dataloader()[1].positions) == 23


def test_the_loader_alone(folders: dict[str, Path]) -> None:
    source = Colours(Poison(BadNets(size=2), 0.5), batch_size=3)
    found = finished(source, ood_loader(source, folders["noise"], "noise"))
    assert torch.equal(found.image, torch.stack([by_pillow(file) for file in files_of(folders["noise"])]))
    assert len(ood_loader(source, folders["noise"], "noise", 2).positions) == 2
    with pytest.raises(ValueError, match="`max_images` to be a positive integer, but got 0"):
        ood_loader(source, folders["noise"], "noise", 0)


def test_processes_share_every_set(folders: dict[str, Path]) -> None:
    data = make(folders)
    seen: list[list[int]] = [[], [], []]
    counts = []
    for rank in range(3):
        data.trainer = cast(Trainer, SimpleNamespace(current_epoch=0, global_rank=rank, world_size=3))
        loaders = data.test_dataloader()
        counts.append([len(loader) for loader in loaders])
        for found, loader in zip(seen, loaders, strict=True):
            found += torch.cat([batch.indices for batch in loader]).tolist()
    assert [sorted(found) for found in seen] == [list(range(40)), list(range(23)), list(range(7))]
    assert counts[0] == counts[1] == counts[2]
    data.trainer = cast(Trainer, SimpleNamespace(current_epoch=0, global_rank=0, world_size=8))
    with pytest.raises(ValueError, match="phase `noise` has 7 images for 8 processes"):
        data.test_dataloader()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("quality", [None, 30])
def test_workers_read_the_same(folders: dict[str, Path], quality: int | None) -> None:
    alone, helped = (make(folders, Colours(num_workers=count), jpeg_quality=quality) for count in (0, 2))
    loaders = helped.test_dataloader()
    assert [loader.num_workers for loader in loaders] == [0, 2, 2]
    for one, other in zip(alone.test_dataloader(), loaders, strict=True):
        assert torch.equal(finished(alone, one).image, finished(helped, other).image)


class Foreign(LightningModule):
    """Knows nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(180, 4)
        self.seen: dict[int, list[Tensor]] = {}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.seen.setdefault(dataloader_idx, []).append(y)
        self.log("largest", self.layer(x.flatten(1)).max())


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_trainer_tests_a_foreign_module(folders: dict[str, Path], tmp_path: Path, precision: str) -> None:
    module = Foreign()
    data = make(folders, Colours(batch_format="pair"))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=cast(Any, precision),
        default_root_dir=tmp_path,
    )
    results = trainer.test(module, datamodule=data, verbose=False)
    assert [list(result) for result in results] == [[f"largest/dataloader_idx_{number}"] for number in range(3)]
    labels = [torch.cat(module.seen[number]) for number in range(3)]
    assert torch.equal(labels[0], torch.arange(40) % 4)
    assert [label.tolist() for label in labels[1:]] == [[-1] * 23, [-1] * 7]


def test_it_is_written_in_yaml(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    (tmp_path / "ood.yaml").write_text(
        f"""
data:
  class_path: lightning_bd.datamodules.ood.OODDataModule
  init_args:
    id: {{class_path: lightning_bd.datamodules.DigitsDataModule, init_args: {{subset: 200, exclude: [3, 9]}}}}
    near: {{letters: {folders["letters"]}}}
    far: {{noise: {folders["noise"]}}}
    max_images: 6
    jpeg_quality: 90
"""
    )
    arguments = ["--config", str(tmp_path / "ood.yaml"), "--trainer.logger=false", "--trainer.accelerator=cpu"]
    monkeypatch.setattr("sys.argv", ["test"])
    cli = LightningCLI(
        Foreign,
        OODDataModule,
        subclass_mode_data=True,
        seed_everything_default=False,
        args=arguments,
        run=False,
        save_config_callback=None,
    )
    data = cli.datamodule
    assert isinstance(data, OODDataModule)
    assert data.test_set_names == ["id", "letters", "noise"]
    assert [len(loader.positions) for loader in data.test_dataloader()] == [359, 6, 6]
    assert len(data.clean_fit_dataloader().positions) == 198


def test_global_random_state_is_untouched(folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    data = make(folders, jpeg_quality=80)
    for loader in data.test_dataloader():
        finished(data, loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_sets_are_selected_from_and_told_apart(folders: dict[str, Path]) -> None:
    images = UnlabelledImages(folders["noise"], find_images(folders["noise"]), (3, 6, 10))
    positions = torch.tensor([4, 1])
    for whole in (images, JpegImages(images, 40)):
        part = whole.select(positions)
        assert torch.equal(part.read(torch.arange(2)), whole.read(positions))
        assert part.labels.tolist() == [-1, -1]
    smaller = UnlabelledImages(folders["noise"], find_images(folders["noise"]), (3, 5, 10))
    several = (images, images.select(positions), smaller, JpegImages(images, 40), JpegImages(images, 41))
    assert len({each.fingerprint() for each in several}) == 5
    assert images.fingerprint() == images.select(torch.arange(7)).fingerprint()


def test_prepare_data_is_that_of_the_data_set(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Colours, "prepare_data", lambda self: asked.append(self))
    data = make(folders)
    data.prepare_data()
    assert asked == [data.id]


def test_refuses_folders_when_set_up(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"There is no folder .*nowhere\. Pass a folder of images"):
        OODDataModule(Colours(), far={"gone": str(tmp_path / "nowhere")}).setup()
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("none")
    with pytest.raises(MisconfigurationException, match=r"The folder .*empty holds no image \(\.jpg, "):
        OODDataModule(Colours(), near={"empty": str(tmp_path / "empty")}).setup()


def test_names_a_broken_image(folders: dict[str, Path]) -> None:
    (folders["noise"] / "3.png").write_bytes(b"\x89PNG")
    data = make(folders)
    with pytest.raises(ValueError, match=r"Cannot read the image .*noise/3\.png: "):
        finished(data, data.test_dataloader()[2])


@pytest.mark.parametrize(
    ("near", "far", "name"), [({"a": "x"}, {"a": "y"}, "a"), ({"id": "x"}, None, "id"), (None, {"id": "x"}, "id")]
)
def test_refuses_names_that_are_taken(near: dict[str, str] | None, far: dict[str, str] | None, name: str) -> None:
    with pytest.raises(ValueError, match=f"to have names of their own, but `{name}` is taken"):
        OODDataModule(Colours(), near, far)


def test_refuses_to_be_without_sets() -> None:
    with pytest.raises(ValueError, match="`near` or `far` to name at least one folder of images, but both are empty"):
        OODDataModule(Colours(), {}, None)


@pytest.mark.parametrize("quality", [0, 96])
def test_refuses_the_quality(quality: int) -> None:
    with pytest.raises(ValueError, match=rf"`jpeg_quality` to be in \[1, 95\], but got {quality}"):
        OODDataModule(Colours(), far={"a": "x"}, jpeg_quality=quality)


@pytest.mark.parametrize("name", ["batch_size", "max_images"])
def test_refuses_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` to be a positive integer, but got 0"):
        OODDataModule(Colours(), far={"a": "x"}, **{name: 0})  # type: ignore[arg-type]


def test_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match=r"`image_shape` to have 1 channel or 3, but got \(4, 8, 8\)"):
        UnlabelledImages(Path(), [], (4, 8, 8))
