"""Measure how many images per second each static trigger changes on the CPU.

A batch is changed again and again; turns of all triggers alternate, so that other load on the machine meets all of
them. The first two turns of each are not counted. Beside the clock's time stands the CPU's, which other load lengthens
less; with several threads it holds their waiting for each other too, so that it is measured on one.

    python benchmarks/triggers.py
    python benchmarks/triggers.py --threads 1
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_bd.triggers import (
    SIG,
    AdaptiveBlend,
    BadNets,
    Blended,
    BppAttack,
    LowFrequency,
    SequentialTrigger,
    WaNet,
)

WARM_UP = 2
#: Images per second that each is meant to reach on two threads; none where nothing was promised.
TARGETS = {
    "BadNets": 500_000,
    "Blended": 500_000,
    "SIG": 500_000,
    "WaNet": 250_000,
    "WaNet, cover": 60_000,
    "LowFrequency": 100_000,
    "BppAttack": 100_000,
}


def seconds(change: Callable[[Tensor], object], images: Tensor, repeats: int) -> tuple[float, float]:
    """Return the seconds of one call, the clock's and the CPU's."""
    start, before = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        change(images)
    return (time.perf_counter() - start) / repeats, (time.process_time() - before) / repeats


def main() -> None:
    """Run the turns and print the medians."""
    parser = argparse.ArgumentParser(description="Speed of triggers on the CPU.")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20, help="calls per turn")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.batch_size, 3, arguments.size, arguments.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    warp, bpp = WaNet(), BppAttack()
    changes: dict[str, Callable[[Tensor], object]] = {
        "BadNets": BadNets(),
        "Blended": Blended(),
        "AdaptiveBlend": AdaptiveBlend(),
        "SIG": SIG(),
        "WaNet": warp,
        "WaNet, cover": lambda batch: warp.cover(batch, generator),
        "LowFrequency": LowFrequency(),
        "BppAttack": bpp,
        "BppAttack, cover": lambda batch: bpp.cover(batch, generator),
        "BppAttack, dithering": BppAttack(dithering=True),
        "SequentialTrigger, Blended and BadNets": SequentialTrigger([Blended(), BadNets()]),
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in changes}
    for _ in range(arguments.turns + WARM_UP):
        for name, change in changes.items():
            turns[name].append(seconds(change, images, arguments.repeats))
    print(f"batch {arguments.batch_size} x 3 x {arguments.size} x {arguments.size}, {arguments.threads} threads")
    for name, values in turns.items():
        speeds = [arguments.batch_size / clock for clock, _ in values[WARM_UP:]]
        per_cpu = statistics.median(arguments.batch_size / cpu for _, cpu in values[WARM_UP:])
        target = f", target {TARGETS[name]:,}" if name in TARGETS else ""
        print(
            f"{name:40s} {statistics.median(speeds):11,.0f} images/s "
            f"({min(speeds):,.0f} to {max(speeds):,.0f}{target}), {per_cpu:,.0f} per second of the CPU"
        )


if __name__ == "__main__":
    main()
