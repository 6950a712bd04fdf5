"""Raw batches as they travel."""

import torch

from lightning_bd.batch import BatchContext, RawBatch


def make_batch() -> RawBatch:
    return RawBatch(
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.tensor([1, 0]),
        torch.tensor([5, 6]),
        BatchContext("inject", "dynamic", train=True),
        poison_rows=torch.tensor([1]),
        poison_labels=torch.tensor([0]),
        cover_seeds=(3,),
        flips=torch.tensor([True, False]),
    )


def test_all_tensors_move_and_the_rest_stays() -> None:
    batch = make_batch()
    moved = batch.to("meta")
    for name in ("images", "labels", "indices", "poison_rows", "poison_labels", "flips"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert moved.context is batch.context
    assert moved.cover_seeds == (3,)
    assert moved.cover_rows is None
    assert moved.crop_offsets is None
    assert len(moved) == 2


def test_no_copy_on_the_same_device() -> None:
    batch = make_batch()
    assert batch.to(torch.device("cpu")) is batch
