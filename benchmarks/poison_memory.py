"""Memory of a poisoned data set of 50,000 images of 32 x 32 pixels: loading it, and one epoch of its batches.

Writes noise in CIFAR-10's format, and reads it in a process of its own with a static poison and its covers. Printed is
that process' peak minus its size after the imports. The images themselves are 147 MiB, those of the test set 29 MiB.

    python benchmarks/poison_memory.py
    python benchmarks/poison_memory.py --trigger WaNet --cover_rate 0.2
"""

import argparse
import hashlib
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from lightning_bd import triggers
from lightning_bd.datamodules import CIFAR10DataModule, PhaseData
from lightning_bd.poisoning import Poison

ASKED = 400


def write(root: Path, images: int) -> None:
    """Write training and test batches, a fifth as many images in the test set."""
    folder = root / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in [(name, images // 5) for name, _ in CIFAR10.train_list] + [("test_batch", images // 5)]:
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [label % 10 for label in range(count)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {label}" for label in range(10)]}))


class _Reader(CIFAR10):
    """Accepts the files that :func:`write` made."""


class _Data(CIFAR10DataModule):
    reader = _Reader


def accept(root: Path) -> None:
    """Take the checksums of the files as the right ones, reading them piece by piece."""

    def checksum(name: str) -> str:
        with (root / CIFAR10.base_folder / name).open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()

    _Reader.train_list = [[name, checksum(name)] for name, _ in CIFAR10.train_list]
    _Reader.test_list = [[name, checksum(name)] for name, _ in CIFAR10.test_list]
    _Reader.meta = {**CIFAR10.meta, "md5": checksum("batches.meta")}


def resident() -> float:
    """Return the present size of the process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def peak() -> float:
    """Return the largest size of the process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(arguments: argparse.Namespace) -> None:
    """Read the data set and print."""
    torch.set_num_threads(arguments.threads)
    accept(arguments.read)
    trigger = getattr(triggers, arguments.trigger)()
    poison = Poison(trigger, rate=0.1, target=0, mode="static", cover_rate=arguments.cover_rate)
    before, start = resident(), time.perf_counter()
    data = _Data(root=arguments.read, poison=poison, splits={"train": 1.0}, seed=0)
    data.set_phase(PhaseData("train", ("train",), "static"))
    loaded, held = peak(), resident()
    images = poisoned = 0
    for raw in data.train_dataloader():
        batch = data.on_after_batch_transfer(raw, 0)
        images, poisoned = images + len(batch[0]), poisoned + int(batch[2].sum())
    print(
        f"{arguments.trigger}, {images} images, {poisoned} of them poisoned, {time.perf_counter() - start:.1f} s\n"
        f"process after import {before:.0f} MiB; above it: {loaded - before:.0f} while loading, {held - before:.0f} "
        f"held, {peak() - before:.0f} at most with an epoch (asked: below {ASKED})"
    )


def main() -> None:
    """Write the images, and measure in another process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--trigger", default="BadNets", help="a class of lightning_bd.triggers")
    parser.add_argument("--cover_rate", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--read", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.images)
        subprocess.run([sys.executable, *sys.argv, "--read", folder], check=True)


if __name__ == "__main__":
    main()
