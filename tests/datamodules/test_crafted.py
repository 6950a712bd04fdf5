"""Sets of which some images were replaced."""

import torch
from torch import Tensor

from lightning_bd.datamodules.crafted import CraftedImages
from lightning_bd.datamodules.images import TensorImages


def clean() -> TensorImages:
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    return TensorImages(pixels, torch.arange(10) % 2, ("a", "b"))


def overlay(positions: list[int]) -> tuple[CraftedImages, Tensor]:
    crafted = torch.tensor([100 + position for position in positions], dtype=torch.uint8)
    crafted = crafted.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return CraftedImages(clean(), torch.tensor(positions), crafted), crafted


def test_only_the_named_images_are_replaced() -> None:
    images, _ = overlay([7, 2])
    assert len(images) == 10
    assert images.image_shape == (3, 4, 4)
    assert images.class_names == ("a", "b")
    assert torch.equal(images.labels, clean().labels)
    asked = torch.tensor([2, 3, 7, 2, 0])
    assert images.read(asked)[:, 0, 0, 0].tolist() == [102, 3, 107, 102, 0]
    assert images.read(torch.tensor([1, 3]))[:, 0, 0, 0].tolist() == [1, 3]
    assert torch.equal(images.images.read(torch.arange(10)), clean().read(torch.arange(10)))


def test_a_part_of_it() -> None:
    part = overlay([7, 2])[0].select(torch.tensor([9, 7, 2, 1]))
    assert part.read(torch.arange(4))[:, 0, 0, 0].tolist() == [9, 107, 102, 1]
    assert part.labels.tolist() == [1, 1, 0, 1]


def test_the_fingerprint_is_of_what_is_read() -> None:
    first, again, other = overlay([7, 2])[0], overlay([7, 2])[0], overlay([7, 3])[0]
    assert first.fingerprint() == again.fingerprint()
    assert len({first.fingerprint(), other.fingerprint(), clean().fingerprint()}) == 3
    again.crafted[0, 0, 0, 0] = 0
    assert first.fingerprint() != again.fingerprint()
