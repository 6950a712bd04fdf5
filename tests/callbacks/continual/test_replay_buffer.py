"""The reservoir against Algorithm R run sample by sample, and against its distribution."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from lightning_bd.callbacks.continual.replay_buffer import ReplayBuffer, merge_buffers
from lightning_bd.functional.draws import keyed_generator


def make_samples(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Images that tell their number: its two bytes are the two pixels."""
    numbers = torch.arange(start, start + count)
    pixels = torch.stack([numbers // 256, numbers % 256], dim=1)
    return pixels.view(count, 1, 1, 2).float() / 255, numbers


def make_buffer(batches: list[int], capacity: int, seed: int = 0, start: int = 0) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, seed)
    for size in batches:
        buffer.insert(*make_samples(size, start))
        start += size
    return buffer


def held(buffer: ReplayBuffer) -> list[int]:
    labels: list[int] = buffer.sample(buffer.capacity, torch.Generator().manual_seed(0)).labels.tolist()
    return sorted(labels)


def algorithm_r(batches: list[int], capacity: int, seed: int) -> list[int]:
    """One sample at a time; ``draws[n]`` is uniform in 0 .. n."""
    slots: list[int] = []
    number = 0
    for size in batches:
        generator = keyed_generator(seed, "reservoir", number)
        for bits in torch.empty(size, dtype=torch.int64).random_(generator=generator).tolist():
            place = bits % (number + 1)
            if number < capacity:
                slots.append(number)
            elif place < capacity:
                slots[place] = number
            number += 1
    return slots


def deviation(subsets: list[tuple[int, ...]]) -> float:
    """Probability that pairs of six numbers, drawn uniformly, are at least as unequal in number as these."""
    counts = torch.tensor([subsets.count(pair) for pair in combinations(range(6), 2)], dtype=torch.float64)
    assert counts.sum() == len(subsets)
    expected = len(subsets) / len(counts)
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1))


@pytest.mark.parametrize("batches", [[300], [1] * 300, [3, 160, 1, 136], [10, 290]])
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_batches_equal_samples_one_by_one(batches: list[int], capacity: int) -> None:
    """Also where several samples of a batch are drawn for one place."""
    expected = algorithm_r(batches, capacity, seed=3)
    state = make_buffer(batches, capacity, seed=3).state_dict()
    assert state["labels"].tolist() == expected
    assert torch.equal(state["images"].float() / 255, make_samples(300)[0][expected])
    assert state["seen"] == 300


@pytest.mark.parametrize("batches", [[6], [1] * 6, [3, 3]])
def test_every_subset_is_as_likely(batches: list[int]) -> None:
    subsets = [tuple(held(make_buffer(batches, 2, seed))) for seed in range(750)]
    assert deviation(subsets) > 0.01


def test_every_subset_of_a_merge_is_as_likely() -> None:
    """Of buffers that saw two and four samples, the second gives the more."""
    subsets = []
    for seed in range(750):
        buffers = [make_buffer([2], 2, seed), make_buffer([4], 2, seed, start=2)]
        subsets.append(tuple(held(merge_buffers(buffers, seed))))
    assert deviation(subsets) > 0.01


def test_merge_keeps_the_samples_and_counts_all() -> None:
    buffers = [make_buffer([40], 16), make_buffer([5], 16, start=40), ReplayBuffer(16)]
    before = [buffer.state_dict() for buffer in buffers[:2]]
    merged = merge_buffers(buffers, seed=5)
    assert (len(merged), merged.seen, merged.capacity, merged.seed) == (16, 45, 16, 5)
    assert set(held(merged)) <= set(held(buffers[0])) | set(held(buffers[1]))
    batch = merged.sample(16, torch.Generator())
    assert torch.equal(batch.images, make_samples(45)[0][batch.labels])
    assert [b.state_dict()["labels"].tolist() for b in buffers[:2]] == [state["labels"].tolist() for state in before]
    assert merge_buffers([ReplayBuffer(2)]).seen == 0


def test_images_are_rounded_to_eight_bits() -> None:
    images = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 0.3, 1.0, 1.0005, -0.0005])
    buffer = ReplayBuffer(7)
    buffer.insert(images.view(7, 1), torch.arange(7))
    state = buffer.state_dict()
    assert state["images"].dtype == torch.uint8
    assert state["images"].flatten().tolist() == [0, 0, 1, 76, 255, 255, 0]  # 0.3 * 255 = 76.5, to even
    batch = buffer.sample(7, torch.Generator())
    assert batch.images.dtype == torch.float32
    torch.testing.assert_close(batch.images.flatten(), state["images"].flatten()[batch.labels] / 255)


def test_samples_without_replacement() -> None:
    buffer = make_buffer([20], 10)
    for seed in range(20):
        drawn = buffer.sample(6, torch.Generator().manual_seed(seed)).labels.tolist()
        assert len(set(drawn)) == 6
    assert len({tuple(buffer.sample(6, torch.Generator().manual_seed(seed)).labels.tolist()) for seed in range(20)}) > 1
    assert len(buffer.sample(100, torch.Generator()).labels) == 10
    partly = make_buffer([3], 10)
    assert held(partly) == [0, 1, 2]
    assert len(partly) == 3


def test_logits_stay_with_their_images() -> None:
    buffer = ReplayBuffer(8)
    for start in (0, 20, 40):
        images, labels = make_samples(20, start)
        buffer.insert(images, labels, labels[:, None] * torch.tensor([1.0, -0.5], dtype=torch.float64))
    batch = buffer.sample(8, torch.Generator())
    assert batch.logits is not None
    assert batch.logits.dtype == torch.float32
    assert torch.equal(batch.logits, batch.labels[:, None] * torch.tensor([1.0, -0.5]))
    again = ReplayBuffer(8)
    again.load_state_dict(buffer.state_dict())
    restored = again.sample(8, torch.Generator()).logits
    assert restored is not None
    assert torch.equal(restored, batch.logits)
    moved = again.to("meta").sample(8, torch.Generator())
    assert {part.device.type for part in moved if part is not None} == {"meta"}


@pytest.mark.parametrize("first", [0, 3, 40])
def test_loaded_buffer_goes_on_as_the_saved_one(tmp_path: Path, first: int) -> None:
    buffer = ReplayBuffer(8, seed=4)
    buffer.insert(*make_samples(first))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    again = ReplayBuffer(8)
    again.insert(*make_samples(2))
    again.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert (len(again), again.seen) == (min(first, 8), first)
    for each in (buffer, again):
        each.insert(*make_samples(30, first))
    assert buffer.state_dict()["labels"].tolist() == again.state_dict()["labels"].tolist()
    assert torch.equal(buffer.state_dict()["images"], again.state_dict()["images"])


def test_loaded_buffer_shares_no_memory() -> None:
    buffer, again = make_buffer([8], 8), ReplayBuffer(8)
    state = buffer.state_dict()
    again.load_state_dict(state)
    for each in (buffer, again):
        each.insert(*make_samples(200, 8))
        assert state["labels"].tolist() == list(range(8))
    assert make_buffer([3], 8).state_dict()["images"].untyped_storage().nbytes() == 3 * 2


def test_draws_leave_the_global_state_and_the_inputs_alone() -> None:
    state = torch.get_rng_state()
    images, labels = make_samples(20)
    buffer = ReplayBuffer(4)
    buffer.insert(images, labels)
    buffer.insert(images[:0], labels[:0])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, make_samples(20)[0])
    assert buffer.seen == 20


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, dtype=torch.uint8), LABELS), r"`images` to be floating point .* got torch\.uint8"),
        ((torch.full((2, 3), 1.5), LABELS), r"in \[0, 1\], but got values from 1\.5 to 1\.5.*into the model"),
        ((torch.full((2, 3), -0.1), LABELS), "move the normalisation out of the data and into the model"),
        ((torch.tensor([[float("nan")], [0.5]]), LABELS), "got values from nan to nan"),
        ((torch.zeros(2, 3), torch.zeros(2)), r"`labels` to hold the numbers of classes, but got torch\.float32"),
        ((torch.zeros(3, 3), LABELS), r"`labels` to have shape \(3,\), one for each image, but got \(2,\)"),
        ((torch.zeros(2, 4), LABELS), r"`images` to have shape \(3,\) for each sample, as before, but got \(4,"),
        ((torch.zeros(2, 3), LABELS, torch.zeros(2, 5)), r"`logits` to have shape None .* but got \(5,\)"),
    ],
)
def test_unsuitable_batches_are_refused(arguments: tuple[Tensor, ...], message: str) -> None:
    buffer = ReplayBuffer(2)
    buffer.insert(torch.zeros(1, 3), LABELS[:1])
    with pytest.raises(ValueError, match=message):
        buffer.insert(*arguments)
    assert buffer.seen == 1


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="`capacity` to be a positive integer, but got 0"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match=r"holds samples, but got an empty one\. Call `insert` first"):
        ReplayBuffer().sample(1, torch.Generator())
    with pytest.raises(ValueError, match="`capacity` to be 3, as when the state was saved, but got 2"):
        ReplayBuffer(2).load_state_dict(ReplayBuffer(3).state_dict())
