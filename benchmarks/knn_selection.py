"""Time of the selection by k nearest neighbours among 5,000 images of 2,048 features, against the matrix product alone.

The CPU's seconds are printed beside those of the clock: other load on the machine lengthens only the latter.

    python benchmarks/knn_selection.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _pairs import alternate, report
from torch import Tensor

from lightning_bd.selection.knn_typicality import mean_neighbour_similarity

ASKED = 0.8


def plain(directions: Tensor, k: int) -> Tensor:
    """The same by whole strips of the matrix, without its symmetry."""
    means = []
    for start in range(0, len(directions), 1000):
        similarity = directions[start : start + 1000] @ directions.T
        similarity.diagonal(start).fill_(-torch.inf)
        means.append(similarity.topk(k, dim=1).values.double().mean(dim=1))
    return torch.cat(means)


def timed(function: Callable[[], object], cpu: list[float]) -> Callable[[], float]:
    """Return a function that gives the wall time of one call, and notes the CPU's."""

    def run() -> float:
        start, before = time.perf_counter(), time.process_time()
        function()
        cpu.append(time.process_time() - before)
        return time.perf_counter() - start

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    features = torch.randn(arguments.images, arguments.features, generator=torch.Generator().manual_seed(0))
    directions, k = F.normalize(features.relu()), arguments.k
    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: mean_neighbour_similarity(directions, k),
        "whole strips": lambda: plain(directions, k),
        "product": lambda: directions @ directions.T,
    }
    difference = float((functions["ours"]() - functions["whole strips"]()).abs().max())
    print(f"{arguments.images} x {arguments.features}, k {k}, {arguments.threads} threads")
    print(f"largest difference to whole strips {difference:.1e}; asked: below {ASKED} s")
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    seconds = alternate({name: timed(function, cpu[name]) for name, function in functions.items()}, arguments.pairs)
    for name, values in seconds.items():
        print(
            f"{name:36s} median {statistics.median(values):.3f} s (best {min(values):.3f}), of the CPU "
            f"{statistics.median(cpu[name]):.3f} s"
        )
    report("ours / product", seconds["ours"], seconds["product"])
    report("ours / product, CPU", cpu["ours"], cpu["product"])


if __name__ == "__main__":
    main()
