"""What an attack does to test images: a figure, and how visible it is."""

import csv
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_bd.datamodules import ImageDataModule
from lightning_bd.datamodules.loader import BatchLoader, Place
from lightning_bd.datamodules.rendering import to_float
from lightning_bd.functional.stealth import largest_change, peak_signal_to_noise_ratio, structural_similarity
from lightning_bd.reports.preview import preview_figure

__all__ = ("Stealth", "draw_preview")


@dataclass(frozen=True)
class Stealth:
    """How visible a trigger is.

    Attributes:
        images: Number of images.
        unchanged: How many of them the trigger leaves as they are.
        psnr: Mean over the changed images, in dB; infinite if there is none.
        ssim: Mean structural similarity.
        largest_change: Mean of the largest change of a pixel, in [0, 1].
    """

    images: int
    unchanged: int
    psnr: float
    ssim: float
    largest_change: float

    means = ("PSNR (dB)", "SSIM", "L-infinity")

    def cells(self) -> list[str]:
        """Return the means as text."""
        return [f"{self.psnr:.2f}", f"{self.ssim:.4f}", f"{self.largest_change:.4f}"]

    def write(self, name: str, path: Path) -> None:
        """Write one row.

        Args:
            name: What the attack is called.
            path: The CSV file.
        """
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["trigger", *asdict(self)])
            writer.writerow([name, *asdict(self).values()])


def draw_preview(data: ImageDataModule, path: Path, images: int, max_images: int) -> tuple[str, Stealth]:
    """Draw some test images that the attack aims at, as it changes them, and measure the change on more.

    Args:
        data: The data, with a poison; its trigger is used as in the attack, not as in training.
        path: The PNG file.
        images: Number of images to draw, of as many classes as there are.
        max_images: At most so many images to measure, spread evenly over the test set.

    Returns:
        What the attack is called, and how visible it is.
    """
    poison = data.poison
    assert poison is not None
    victims = data.test_dataloader()[1].positions
    measured = _measure(data, victims[_spread(len(victims), max_images)])
    # By class: evenly spread, they are of as many classes as possible.
    by_class = victims[data.test_images.labels[victims].argsort(stable=True)]
    shown = by_class[_spread(len(victims), images)]
    clean, triggered, labels = _changed(data, shown)
    name = type(poison.trigger).__name__
    with torch.no_grad():
        if not torch.equal(poison.trigger(clean), poison.trigger.attack(clean)):
            name += " (its test trigger)"
    names = data.test_images.class_names
    captions = [
        names[before] if before == after else f"{names[before]} to {names[after]}"
        for before, after in zip(data.test_images.labels[shown].tolist(), labels.tolist(), strict=True)
    ]
    psnr, ssim, change = measured.cells()
    title = f"{name}\nPSNR {psnr} dB, SSIM {ssim}, L-infinity {change} (means of {measured.images} test images)"
    preview_figure(clean.numpy(), triggered.numpy(), captions, path, title)
    return name, measured


def _measure(data: ImageDataModule, positions: Tensor) -> Stealth:
    psnr, ssim, change = [], [], []
    # In parts: SSIM needs room for many intermediate results.
    for part in torch.split(positions, 64):
        clean, triggered, _ = _changed(data, part)
        psnr.append(peak_signal_to_noise_ratio(clean, triggered))
        ssim.append(structural_similarity(clean, triggered))
        change.append(largest_change(clean, triggered))
    ratios = torch.cat(psnr)
    finite = ratios[ratios.isfinite()]
    return Stealth(
        images=len(ratios),
        unchanged=len(ratios) - len(finite),
        psnr=float(finite.mean()) if len(finite) else math.inf,
        ssim=float(torch.cat(ssim).mean()),
        largest_change=float(torch.cat(change).mean()),
    )


def _changed(data: ImageDataModule, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return test images clean and triggered, in the order of ``positions``, and the attacker's labels."""
    loader: BatchLoader = data.test_dataloader()[1]
    loader.positions, loader.place = positions, Place
    clean, triggered, labels = [], [], []
    for raw in loader:
        image, label = data.on_after_batch_transfer(raw, 0)[:2]
        clean.append(to_float(data.test_images.read(raw.indices)))
        triggered.append(image.float())
        labels.append(label)
    return torch.cat(clean), torch.cat(triggered), torch.cat(labels)


def _spread(count: int, wanted: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()
