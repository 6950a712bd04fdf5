"""The loader: what is drawn, for whom, and when."""

import random
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bd.batch import BatchContext, RawBatch
from lightning_bd.datamodules.images import FileImages, ImageSet, TensorImages
from lightning_bd.datamodules.loader import BatchLoader, Place
from lightning_bd.datamodules.rendering import render
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets, WaNet

TRAIN = BatchContext("inject", "dynamic", "dynamic", train=True)


def in_memory(count: int) -> TensorImages:
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorImages(images, torch.arange(count) % 4, "abcd")


def prepared(rate: float = 0.3, cover_rate: float = 0.0) -> Poison:
    poison = Poison(WaNet() if cover_rate else BadNets(), rate, cover_rate=cover_rate)
    poison.prepare((3, 8, 8), 4)
    return poison


def make_loader(
    images: ImageSet,
    context: BatchContext = TRAIN,
    batch_size: int = 8,
    place: Callable[[], Place] = Place,
    seed: int = 0,
    cover_rate: float = 0.0,
    num_workers: int = 0,
) -> BatchLoader:
    return BatchLoader(
        images,
        torch.arange(len(images)),
        context,
        batch_size=batch_size,
        seed=seed,
        poison=prepared(cover_rate=cover_rate),
        augment="crop_flip",
        padding=1,
        place=place,
        num_workers=num_workers,
    )


def assert_same(one: RawBatch, other: RawBatch) -> None:
    for field in fields(RawBatch):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs, field.name


def indices(loader: BatchLoader) -> list[int]:
    return torch.cat([batch.indices for batch in loader]).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_streaming_equals_memory(file_images: FileImages, num_workers: int) -> None:
    streamed = list(make_loader(file_images, num_workers=num_workers, cover_rate=0.2))
    held = list(make_loader(file_images.in_memory(), num_workers=num_workers, cover_rate=0.2))
    assert len(streamed) == len(held) == 5
    poison = prepared(cover_rate=0.2)
    for one, other in zip(streamed, held, strict=True):
        assert_same(one, other)
        for mine, theirs in zip(render(one, poison, 1), render(other, poison, 1), strict=True):
            assert torch.equal(mine, theirs)


def test_workers_are_for_files_alone(file_images: FileImages) -> None:
    assert make_loader(in_memory(8), num_workers=2).num_workers == 0
    assert make_loader(file_images, num_workers=2).num_workers == 2


def test_the_same_key_gives_the_same_batches() -> None:
    for one, other in zip(make_loader(in_memory(40)), make_loader(in_memory(40)), strict=True):
        assert_same(one, other)


def test_epochs_differ_in_order_crops_and_poison() -> None:
    epoch = 0
    loader = make_loader(in_memory(40), place=lambda: Place(epoch))
    first = list(loader)
    epoch = 1
    second = list(loader)
    epoch = 0
    for one, other in zip(first, loader, strict=True):
        assert_same(one, other)
    orders = [torch.cat([batch.indices for batch in batches]).tolist() for batches in (first, second)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    crops = [
        torch.cat([batch.crop_offsets for batch in batches if batch.crop_offsets is not None])
        for batches in (first, second)
    ]
    assert not torch.equal(crops[0], crops[1])
    poisoned = [
        {int(i) for batch in batches if batch.poison_rows is not None for i in batch.indices[batch.poison_rows]}
        for batches in (first, second)
    ]
    assert poisoned[0] != poisoned[1]


def test_the_epoch_is_read_with_the_first_batch() -> None:
    epoch = 0
    loader = make_loader(in_memory(40), place=lambda: Place(epoch))
    expected = next(iter(loader)).indices
    iterator = iter(loader)
    epoch = 3
    assert not torch.equal(next(iterator).indices, expected)


def test_batches_of_an_epoch_differ_in_their_draws() -> None:
    batches = list(make_loader(in_memory(40)))
    offsets = [batch.crop_offsets for batch in batches]
    assert len({tuple(o.flatten().tolist()) for o in offsets if o is not None}) == len(batches)


@pytest.mark.parametrize(("seed", "phase"), [(1, "inject"), (0, "defend")])
def test_seed_and_phase_are_part_of_the_key(seed: int, phase: str) -> None:
    other = make_loader(in_memory(40), BatchContext(phase, "dynamic", train=True), seed=seed)
    assert indices(other) != indices(make_loader(in_memory(40)))


@pytest.mark.parametrize(
    ("count", "world_size", "batch_size"),
    [
        (40, 1, 8),
        (41, 1, 8),
        (41, 2, 8),
        (43, 3, 4),
        (7, 4, 1),
        (5, 5, 2),
        (9, 2, 2),
        (17, 2, 8),
        (1, 1, 4),
        (100, 7, 3),
        (12, 5, 1),
        (3, 2, 8),
    ],
)
def test_ranks_are_in_step_disjoint_and_complete(count: int, world_size: int, batch_size: int) -> None:
    images = in_memory(count)
    for train in (True, False):
        context = BatchContext("p", train=train)
        shares: list[list[int]] = []
        sizes: list[list[int]] = []
        for rank in range(world_size):
            loader = make_loader(images, context, batch_size, lambda rank=rank: Place(2, rank, world_size))  # type: ignore[misc]
            batches = list(loader)
            assert len(batches) == len(loader)
            shares.append(torch.cat([batch.indices for batch in batches]).tolist())
            sizes.append([len(batch) for batch in batches])
        together = [index for share in shares for index in share]
        assert len(set(together)) == len(together)
        assert len({len(size) for size in sizes}) == 1
        assert min(size for rank in sizes for size in rank) > 0
        if train:
            share = count // world_size
            kept = share - 1 if share > batch_size and share % batch_size == 1 else share
            assert [len(s) for s in shares] == [kept] * world_size
            assert all(size == batch_size for rank in sizes for size in rank[:-1])
        else:
            assert sorted(together) == list(range(count))
            assert all(share == sorted(share) for share in shares)
            largest = batch_size if batch_size > 1 or count % world_size == 0 else 2
            assert max(size for rank in sizes for size in rank) <= largest


def test_a_last_batch_of_one_image_is_left_out_of_training_alone() -> None:
    images = in_memory(17)
    assert [len(b) for b in make_loader(images)] == [8, 8]
    assert len(indices(make_loader(images, BatchContext("test")))) == 17
    assert [len(b) for b in make_loader(in_memory(1))] == [1]


def test_ranks_draw_for_themselves() -> None:
    loaders = [make_loader(in_memory(80), place=lambda rank=rank: Place(0, rank, 2)) for rank in (0, 1)]  # type: ignore[misc]
    first, second = (next(iter(loader)).crop_offsets for loader in loaders)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


def test_evaluation_is_in_order_and_not_augmented() -> None:
    batches = list(make_loader(in_memory(20), BatchContext("test")))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(20))
    for batch in batches:
        assert batch.crop_offsets is None
        assert batch.flips is None
        assert batch.poison_rows is None


def test_crops_and_flips_cover_their_range() -> None:
    batches = list(make_loader(in_memory(400), batch_size=100))
    offsets = torch.cat([batch.crop_offsets for batch in batches if batch.crop_offsets is not None])
    flips = torch.cat([batch.flips for batch in batches if batch.flips is not None])
    assert offsets.shape == (400, 2)
    # Padding 1: 3 x 3 offsets of probability 1 / 9; 400 draws: 44 each, standard deviation 6.3.
    counts = (offsets[:, 0] * 3 + offsets[:, 1]).bincount()
    assert len(counts) == 9
    assert int(counts.min()) > 19
    assert int(counts.max()) < 70
    assert 0.4 < float(flips.float().mean()) < 0.6


def test_crop_alone_does_not_mirror() -> None:
    loader = BatchLoader(in_memory(8), torch.arange(8), TRAIN, batch_size=8, augment="crop", poison=prepared())
    batch = next(iter(loader))
    assert batch.crop_offsets is not None
    assert batch.flips is None


def test_attack_loader_triggers_every_image() -> None:
    for batch in make_loader(in_memory(20), BatchContext("test", "all", "static")):
        assert batch.poison_rows is not None
        assert batch.poison_labels is not None
        assert batch.poison_rows.tolist() == list(range(len(batch)))
        assert batch.poison_labels.tolist() == [0] * len(batch)


def test_static_rows_and_cover_seeds_belong_to_the_image() -> None:
    images, poison = in_memory(40), prepared(cover_rate=0.2)
    rows = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.tensor([3, 9, 30]), True)
    covers = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.tensor([1, 2, 25]), True)
    epoch = 0

    def make(batch_size: int) -> BatchLoader:
        return BatchLoader(
            images,
            torch.arange(40),
            BatchContext("inject", "static", "static", train=True),
            batch_size=batch_size,
            poison=poison,
            place=lambda: Place(epoch),
            static_rows=rows,
            static_covers=covers,
        )

    seeds: list[dict[int, int]] = []
    pixels: list[Tensor] = []
    for epoch, batch_size in ((0, 8), (1, 8), (0, 12)):  # noqa: B007  # read by the loader
        seen: dict[int, int] = {}
        poisoned: set[int] = set()
        finished = torch.zeros(40, 3, 8, 8)
        for batch in make(batch_size):
            assert batch.poison_rows is not None
            poisoned |= set(batch.indices[batch.poison_rows].tolist())
            if batch.cover_rows is not None:
                seen |= dict(zip(batch.indices[batch.cover_rows].tolist(), batch.cover_seeds, strict=True))
            finished[batch.indices] = render(batch, poison, 1).image
        assert poisoned == {3, 9, 30}
        seeds.append(seen)
        pixels.append(finished)
    assert set(seeds[0]) == {1, 2, 25}
    assert len(set(seeds[0].values())) == 3
    assert seeds[0] == seeds[1] == seeds[2]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])


def test_dynamic_covers_are_drawn_per_batch() -> None:
    batches = list(make_loader(in_memory(80), batch_size=40, cover_rate=0.4))
    assert all(batch.cover_rows is not None and len(batch.cover_seeds) == 1 for batch in batches)
    assert batches[0].cover_seeds != batches[1].cover_seeds


def test_global_random_state_is_untouched(file_images: FileImages) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()
    poison = prepared(cover_rate=0.3)
    for loader in (make_loader(in_memory(40), cover_rate=0.3), make_loader(file_images)):
        for batch in loader:
            render(batch, poison, 1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state(legacy=True)) == repr(numpy_state)
    assert random.getstate() == python_state


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_leave_the_global_random_state(file_images: FileImages) -> None:
    state = torch.get_rng_state()
    list(make_loader(file_images, num_workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_refuses_more_processes_than_images() -> None:
    with pytest.raises(ValueError, match="one image per process, but phase `inject` has 3 images for 4 processes"):
        make_loader(in_memory(3), place=lambda: Place(0, 0, 4))
