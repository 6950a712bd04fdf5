"""Measure how fast training batches are made, against torchvision's transforms in a DataLoader.

Both make augmented float batches of generated images on the CPU. Ours also puts a dynamic trigger on a tenth of them,
in one process and one thread; torchvision's pipeline (``ToPILImage``, ``RandomCrop``, ``RandomHorizontalFlip``,
``ToTensor``) has no trigger and two worker processes that outlive the epoch. The two take turns, so that other load on
the machine meets both. The first two turns of each are not counted.

    python benchmarks/batches.py
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lightning_bd.datamodules import ImageDataModule
from lightning_bd.datamodules.augmentation import crop_and_flip
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.datamodules.rendering import to_float
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

BATCH_SIZE = 128
WARM_UP = 2


class Generated(ImageDataModule):
    """Random images of 32x32 pixels."""

    def __init__(self, count: int) -> None:
        super().__init__(Poison(BadNets(), rate=0.1), batch_size=BATCH_SIZE, augment="crop_flip", seed=0)
        self.count = count

    def load(self, train: bool) -> TensorImages:
        """Return the images."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (self.count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return TensorImages(images, torch.arange(self.count) % 10, "0123456789")


class Transformed(Dataset[tuple[Tensor, int]]):
    """The same images, one at a time, through torchvision's transforms."""

    def __init__(self, images: TensorImages) -> None:
        self.images = images.images
        self.labels = images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def ours(data: ImageDataModule) -> Iterator[Tensor]:
    """Yield the images of one epoch of our batches."""
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch, 0)[0]


def images_per_second(batches: Iterator[Tensor]) -> float:
    """Return the speed of one epoch."""
    start = time.perf_counter()
    count = sum(len(images) for images in batches)
    return count / (time.perf_counter() - start)


def stages(data: ImageDataModule) -> dict[str, float]:
    """Return the seconds of each stage of a batch, again and again on the same one."""
    loader = data.train_dataloader()
    raw = next(iter(loader))
    offsets = raw.crop_offsets
    assert offsets is not None
    work: dict[str, Callable[[], object]] = {
        "read": lambda: loader.images.read(raw.indices),
        "crop and mirror": lambda: crop_and_flip(raw.images, offsets, raw.flips, 4),
        "to float": lambda: to_float(raw.images),
        "all on the device": lambda: data.on_after_batch_transfer(raw, 0),
        "draws and all, in an epoch": lambda: sum(1 for _ in ours(data)),
    }
    seconds = {}
    for name, run in work.items():
        repeats = 300 if "epoch" not in name else 5
        run()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        seconds[name] = (time.perf_counter() - start) / repeats / (1 if "epoch" not in name else len(loader))
    return seconds


def main() -> None:
    """Run the turns and print the medians."""
    parser = argparse.ArgumentParser(description="Speed of training batches on the CPU.")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of ours; the other has 2 workers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = Generated(arguments.images)
    images = data.train_images
    assert isinstance(images, TensorImages)
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        Transformed(images), BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True
    )
    speeds: dict[str, list[float]] = {"lightning-bd, trigger": [], "torchvision, no trigger": []}
    for _ in range(arguments.repeats + WARM_UP):
        speeds["lightning-bd, trigger"].append(images_per_second(ours(data)))
        speeds["torchvision, no trigger"].append(images_per_second(batch[0] for batch in loader))
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in speeds.items()}
    for name, seconds in stages(data).items():
        print(f"{name:28s} {seconds * 1e6:6.0f} µs per batch")
    for name, median in medians.items():
        turns = speeds[name][WARM_UP:]
        print(f"{name:24s} {median:10,.0f} images/s  (median of {len(turns)}, {min(turns):,.0f} to {max(turns):,.0f})")
    mine, theirs = medians.values()
    print(f"ratio {mine / theirs:.1f}")


if __name__ == "__main__":
    main()
