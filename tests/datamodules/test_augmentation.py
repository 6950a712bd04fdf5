"""Crop and mirror against torchvision, one image at a time."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from lightning_bd.datamodules.augmentation import crop_and_flip, mirror


def random_images(*shape: int) -> Tensor:
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def reference(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    height, width = images.shape[2:]
    results = []
    for image, (top, left), flip in zip(images, offsets.tolist(), flips.tolist(), strict=True):
        window = tv.crop(tv.pad(image, [padding]), top, left, height, width)
        results.append(tv.hflip(window) if flip else window)
    return torch.stack(results)


@pytest.mark.parametrize(
    ("shape", "padding"), [((64, 3, 32, 32), 4), ((20, 1, 8, 8), 1), ((20, 3, 6, 9), 2), ((1, 3, 5, 4), 3)]
)
def test_equals_torchvision(shape: tuple[int, int, int, int], padding: int) -> None:
    images = random_images(*shape)
    generator = torch.Generator().manual_seed(1)
    offsets = torch.randint(0, 2 * padding + 1, (shape[0], 2), generator=generator)
    flips = torch.rand(shape[0], generator=generator) < 0.5
    before = images.clone()
    assert torch.equal(crop_and_flip(images, offsets, flips, padding), reference(images, offsets, flips, padding))
    assert torch.equal(images, before)


def test_every_offset() -> None:
    padding = 2
    offsets = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    images = random_images(25, 2, 4, 6)
    none = torch.zeros(25, dtype=torch.bool)
    for flips in (none, ~none):
        assert torch.equal(crop_and_flip(images, offsets, flips, padding), reference(images, offsets, flips, padding))
    assert torch.equal(crop_and_flip(images, offsets, None, padding), reference(images, offsets, none, padding))


def test_the_middle_window_is_the_image() -> None:
    images = random_images(3, 3, 8, 8)
    assert torch.equal(crop_and_flip(images, torch.full((3, 2), 4), None, 4), images)


def test_mirror_twice_is_the_image() -> None:
    images = random_images(6, 3, 4, 5)
    flips = torch.tensor([True, False, True, True, False, False])
    once = mirror(images, flips)
    assert torch.equal(once, torch.stack([tv.hflip(i) if f else i for i, f in zip(images, flips, strict=True)]))
    assert torch.equal(mirror(once, flips), images)
