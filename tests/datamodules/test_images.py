"""Image sets against Pillow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bd.datamodules.images import FileImages, TensorImages, resize

Write = Callable[[Path, int, int], None]


def pixels(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_tensor_images_read_and_select() -> None:
    images = TensorImages(pixels(), torch.arange(6) % 3, "abc")
    assert (len(images), images.image_shape, images.class_names) == (6, (3, 4, 5), ("a", "b", "c"))
    assert torch.equal(images.read(torch.tensor([4, 1, 4])), pixels()[[4, 1, 4]])
    part = images.select(torch.tensor([5, 2]))
    assert torch.equal(part.images, pixels()[[5, 2]])
    assert part.labels.tolist() == [2, 2]
    part.images.zero_()
    assert torch.equal(images.images, pixels())


def test_images_are_read_contiguous_from_a_transposed_view() -> None:
    stored = pixels().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    read = TensorImages(stored, torch.zeros(6), "a").read(torch.arange(6))
    assert read.is_contiguous()
    assert torch.equal(read, pixels())


def test_tensor_fingerprint_is_of_the_content() -> None:
    labels = torch.arange(6) % 3
    fingerprint = TensorImages(pixels(), labels, "abc").fingerprint()
    assert TensorImages(pixels().clone(), labels.int(), "abc").fingerprint() == fingerprint
    changed = pixels()
    changed[3, 2, 1, 0] += 1
    others = [
        TensorImages(changed, labels, "abc"),
        TensorImages(pixels(), labels.flip(0), "abc"),
        TensorImages(pixels().view(6, 3, 5, 4), labels, "abc"),
    ]
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_refuses_images(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`images` to be \(N, C, H, W\) uint8, but got"):
        TensorImages(images, torch.zeros(2), "a")


def test_refuses_labels() -> None:
    with pytest.raises(ValueError, match=r"one label per image \(6\), but got shape \(5,\)"):
        TensorImages(pixels(), torch.zeros(5), "a")
    for label in (-1, 3):
        with pytest.raises(ValueError, match=rf"labels in \[0, 3\), but got {min(label, 0)} to {max(label, 0)}"):
            TensorImages(pixels(), torch.tensor([0, 0, 0, 0, 0, label]), "abc")


def test_files_are_decoded_as_pillow_does(file_images: FileImages) -> None:
    read = file_images.read(torch.tensor([0, 3]))
    with Image.open(file_images.root / "pictures/00.png") as image:
        assert torch.equal(read[0], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    with Image.open(file_images.root / "pictures/03.png") as image:
        assert image.size == (12, 8)
        resized = image.resize((8, 8), Image.Resampling.BILINEAR)
        assert torch.equal(read[1], torch.from_numpy(np.array(resized)).permute(2, 0, 1))


def test_in_memory_is_the_same(file_images: FileImages) -> None:
    held = file_images.in_memory()
    everything = torch.arange(40)
    assert torch.equal(held.read(everything), file_images.read(everything))
    assert torch.equal(held.labels, file_images.labels)
    assert held.class_names == file_images.class_names


def test_select_keeps_the_files_of_the_part(file_images: FileImages) -> None:
    chosen = torch.tensor([7, 2, 30])
    part = file_images.select(chosen)
    assert torch.equal(part.read(torch.arange(3)), file_images.read(chosen))
    assert part.labels.tolist() == [3, 2, 2]
    assert len(part) == len(part.paths) == 3


def test_file_fingerprint_is_of_names_sizes_and_labels(file_images: FileImages, tmp_path: Path) -> None:
    fingerprint = file_images.fingerprint()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "pictures").mkdir(parents=True)
    for path in file_images.paths.tolist():
        (elsewhere / path).write_bytes((tmp_path / path).read_bytes())

    def copy(labels: torch.Tensor, size: int = 8) -> FileImages:
        return FileImages(elsewhere, file_images.paths.tolist(), labels, "abcd", size)

    assert copy(file_images.labels).fingerprint() == fingerprint
    assert copy(file_images.labels.flip(0)).fingerprint() != fingerprint
    assert copy(file_images.labels, 9).fingerprint() != fingerprint
    with (elsewhere / "pictures/07.png").open("ab") as file:
        file.write(b"\0")
    assert copy(file_images.labels).fingerprint() != fingerprint


def test_names_a_corrupt_image_among_many(file_images: FileImages) -> None:
    (file_images.root / "pictures/21.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"Cannot read the image .*21\.png"):
        file_images.in_memory()


@pytest.mark.parametrize("size", [4, 13, 48])
def test_resize_is_pillows_to_one_grey_level(size: int) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [
            torch.from_numpy(
                np.array(Image.fromarray(i.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR))
            ).permute(2, 0, 1)
            for i in images
        ]
    )
    resized = resize(images, size)
    assert resized.dtype == torch.uint8
    assert int((resized.int() - expected.int()).abs().max()) <= 1


def test_resize_works_in_parts_and_leaves_the_right_size_alone() -> None:
    images = torch.arange(2500).remainder(256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    resized = resize(images, 2)
    assert torch.equal(resized, images[:, :, :2, :2])
    assert resize(images, 4) is images
