"""Rendering against a plain loop over images."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from lightning_bd.batch import BatchContext, RawBatch
from lightning_bd.datamodules.rendering import render, to_bytes, to_float
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import SIG, BadNets, Blended, TrainTestTrigger, Trigger, WaNet

IMAGES = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 5])
OFFSETS = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 2], [2, 0], [1, 0]])
FLIPS = torch.tensor([True, False, True, False, False, True])


def prepared(trigger: Trigger, mode: Literal["static", "dynamic"]) -> Poison:
    poison = Poison(trigger, target=9, mode=mode)
    poison.prepare((3, 8, 8), 10)
    return poison


def make_raw(mode: Literal["static", "dynamic"], augmented: bool = True) -> RawBatch:
    rows = torch.tensor([1, 4])
    return RawBatch(
        IMAGES,
        LABELS,
        torch.arange(10, 16),
        BatchContext("inject", mode, mode, train=True),
        poison_rows=rows,
        poison_labels=torch.tensor([9, 9]),
        crop_offsets=OFFSETS if augmented else None,
        flips=FLIPS if augmented else None,
    )


def augmented(image: Tensor, number: int) -> Tensor:
    top, left = OFFSETS[number].tolist()
    window = tv.crop(tv.pad(image, [1]), top, left, 8, 8)
    return torch.as_tensor(tv.hflip(window) if FLIPS[number] else window)


def as_a_file(image: Tensor) -> Tensor:
    """Round as an 8-bit file does."""
    return torch.from_numpy(np.rint(image.numpy() * np.float32(255)).clip(0, 255).astype(np.uint8))


def tensor_of(image: Tensor) -> Tensor:
    return torch.as_tensor(tv.to_tensor(image.permute(1, 2, 0).numpy()))


@pytest.mark.parametrize("trigger", [BadNets(), Blended(), WaNet()])
def test_static_is_trigger_rounding_augmentation(trigger: Trigger) -> None:
    sample = render(make_raw("static"), prepared(trigger, "static"), padding=1)
    for number, image in enumerate(IMAGES):
        stored = as_a_file(trigger(tensor_of(image)[None])[0]) if number in (1, 4) else image
        assert torch.equal(sample.image[number], tensor_of(augmented(stored, number))), number


@pytest.mark.parametrize("trigger", [BadNets(), Blended(), WaNet()])
def test_dynamic_is_augmentation_trigger_in_float(trigger: Trigger) -> None:
    sample = render(make_raw("dynamic"), prepared(trigger, "dynamic"), padding=1)
    for number, image in enumerate(IMAGES):
        expected = tensor_of(augmented(image, number))
        if number in (1, 4):
            expected = trigger(expected[None])[0]
        assert torch.allclose(sample.image[number], expected, rtol=0, atol=1e-6), number
    assert not torch.equal(sample.image, to_float(to_bytes(sample.image)))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_labels_and_flags(mode: Literal["static", "dynamic"]) -> None:
    sample = render(make_raw(mode), prepared(BadNets(), mode), padding=1)
    assert sample.label.tolist() == [0, 9, 2, 3, 9, 5]
    assert sample.is_poisoned.tolist() == [False, True, False, False, True, False]
    assert sample.original_label.tolist() == LABELS.tolist()
    assert sample.index.tolist() == list(range(10, 16))
    assert sample.image.dtype == torch.float32
    assert sample.image.min() >= 0
    assert sample.image.max() <= 1


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("with_augmentation", [True, False])
def test_a_raw_batch_always_gives_the_same_sample(mode: Literal["static", "dynamic"], with_augmentation: bool) -> None:
    raw, poison = make_raw(mode, with_augmentation), prepared(Blended(), mode)
    before = IMAGES.clone()
    first, second = render(raw, poison, 1), render(raw, poison, 1)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(raw.images, before)
    assert torch.equal(raw.labels, torch.arange(6))


def test_clean_is_to_tensor() -> None:
    raw = RawBatch(IMAGES, LABELS, LABELS, BatchContext("test"))
    for poison in (None, prepared(BadNets(), "dynamic"), prepared(BadNets(), "static")):
        sample = render(raw, poison, 1)
        assert torch.equal(sample.image, torch.stack([tensor_of(image) for image in IMAGES]))
        assert not sample.is_poisoned.any()
        assert torch.equal(sample.label, LABELS)


def test_flips_without_crop() -> None:
    raw = RawBatch(IMAGES, LABELS, LABELS, BatchContext("inject", train=True), flips=FLIPS)
    expected = [tensor_of(tv.hflip(i) if f else i) for i, f in zip(IMAGES, FLIPS, strict=True)]
    assert torch.equal(render(raw, None, 1).image, torch.stack(expected))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_all_rows(mode: Literal["static", "dynamic"]) -> None:
    raw = RawBatch(
        IMAGES,
        LABELS,
        LABELS,
        BatchContext("test", "all", mode),
        poison_rows=torch.arange(6),
        poison_labels=torch.full((6,), 9),
    )
    trigger = Blended()
    sample = render(raw, prepared(trigger, mode), 1)
    expected = trigger(to_float(IMAGES))
    assert torch.equal(sample.image, to_float(as_a_file(expected)) if mode == "static" else expected)
    assert sample.is_poisoned.all()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_attack_set_gets_the_test_trigger_and_training_images_the_other(
    mode: Literal["static", "dynamic"],
) -> None:
    faint, strong = SIG(0.1), SIG(0.5)
    poison = prepared(TrainTestTrigger(faint, strong), mode)
    contexts: tuple[Literal["static", "dynamic", "all"], ...] = ("static", "dynamic", "all")
    for rule in contexts:
        raw = RawBatch(
            IMAGES,
            LABELS,
            LABELS,
            BatchContext("any", rule, mode),
            poison_rows=torch.arange(6),
            poison_labels=torch.full((6,), 9),
        )
        expected = (strong if rule == "all" else faint)(to_float(IMAGES))
        assert torch.equal(
            render(raw, poison, 1).image, to_float(as_a_file(expected)) if mode == "static" else expected
        )


def test_covers_move_pixels_and_keep_the_label() -> None:
    raw = replace(make_raw("static", augmented=False), cover_rows=torch.tensor([0, 3]), cover_seeds=(7, 8))
    trigger = WaNet()
    sample = render(raw, prepared(trigger, "static"), 1)
    for row, seed in ((0, 7), (3, 8)):
        image = trigger.cover(to_float(IMAGES[row : row + 1]), torch.Generator().manual_seed(seed))
        assert torch.equal(sample.image[row], to_float(as_a_file(image[0])))
        assert sample.label[row] == LABELS[row]
        assert not sample.is_poisoned[row]
        assert not torch.equal(sample.image[row], to_float(as_a_file(trigger(to_float(IMAGES[row : row + 1]))[0])))
    assert sample.is_poisoned.tolist() == [False, True, False, False, True, False]


def test_a_static_cover_is_the_same_in_any_batch() -> None:
    poison = prepared(WaNet(), "static")
    raw = replace(make_raw("static", augmented=False), cover_rows=torch.tensor([0, 3]), cover_seeds=(7, 8))
    alone = replace(
        raw,
        images=IMAGES[3:4],
        labels=LABELS[3:4],
        indices=raw.indices[3:4],
        poison_rows=None,
        poison_labels=None,
        cover_rows=torch.tensor([0]),
        cover_seeds=(8,),
    )
    assert torch.equal(render(alone, poison, 1).image[0], render(raw, poison, 1).image[3])


def test_dynamic_covers_share_one_draw_per_batch() -> None:
    raw = replace(make_raw("dynamic", augmented=False), cover_rows=torch.tensor([0, 3]), cover_seeds=(7,))
    trigger = WaNet()
    sample = render(raw, prepared(trigger, "dynamic"), 1)
    expected = trigger.cover(to_float(IMAGES[[0, 3]]), torch.Generator().manual_seed(7))
    assert torch.equal(sample.image[[0, 3]], expected)
    other = render(replace(raw, cover_seeds=(8,)), prepared(trigger, "dynamic"), 1)
    assert not torch.equal(other.image[0], sample.image[0])


def test_to_float_is_torchvisions_to_tensor_for_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_float(levels), torch.as_tensor(tv.to_tensor(levels[0].numpy())))
    assert torch.equal(to_bytes(to_float(levels)), levels)


def test_to_bytes_rounds_and_clamps() -> None:
    values = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.1])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_device_does_not_matter(mode: Literal["static", "dynamic"]) -> None:
    raw = replace(make_raw(mode), cover_rows=torch.tensor([0, 3]), cover_seeds=(7, 8) if mode == "static" else (7,))
    for trigger in (BadNets(), Blended(), WaNet()):
        poison = prepared(trigger, mode)
        here = render(raw, poison, 1)
        there = render(raw.to("cuda"), poison, 1)
        assert there.image.is_cuda
        torch.testing.assert_close(there.image.cpu(), here.image, rtol=0, atol=1 / 255 + 1e-6)
        for one, other in zip(here[1:], there[1:], strict=True):
            assert torch.equal(one, other.cpu())
