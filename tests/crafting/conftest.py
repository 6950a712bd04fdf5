"""Set-up of the tests of crafting."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_bd.batch import Sample
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.datamodules.loader import BatchLoader


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the crafted images of one test."""
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "crafting"


@pytest.fixture
def finished() -> Callable[[ImageDataModule, BatchLoader], Sample]:
    """Return a function that makes all of a loader's samples, by their positions."""

    def finish(data: ImageDataModule, loader: BatchLoader) -> Sample:
        batches = [cast(Sample, data.on_after_batch_transfer(raw, 0)) for raw in loader]
        joined = Sample(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        order = joined.index.argsort()
        return Sample(*(part[order] for part in joined))

    return finish


@pytest.fixture
def save_png() -> Callable[[Path, Tensor], None]:
    """Return a function that writes an image ``(C, H, W)`` uint8 as any other program would."""

    def save(path: Path, image: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
        Image.fromarray(array.contiguous().numpy()).save(path)

    return save
