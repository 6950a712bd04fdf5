"""Memory of scoring 50,000 images with twelve detectors, and of writing the table.

Runs the model over noise made batch by batch, so that what grows is what scoring keeps. Prints the peak of the process
beside its size before.

    python benchmarks/score_memory.py
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from lightning_bd.callbacks import ClassTypicalMatching, FeatureDetector
from lightning_bd.callbacks.detection.score_table import write_scores
from lightning_bd.callbacks.detection.session import ScoringSession
from lightning_bd.commands.detectors import load_detectors, shipped_detectors


def peak() -> float:
    """Return the largest size of the process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--fit", type=int, default=10_000)
    parser.add_argument("--detectors", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    # As wide as ResNet-18 at its end; the network before it keeps nothing.
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
    made = load_detectors(list(shipped_detectors()))
    features = {name: d for name, d in made.items() if isinstance(d, FeatureDetector)}
    every = {**features, "ctm_centered": ClassTypicalMatching(center=True)}
    chosen = dict(list(every.items())[: arguments.detectors])
    before = peak()
    start = time.perf_counter()

    def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        sizes = [min(500, count - first) for first in range(0, count, 500)]
        image = torch.rand(1, 3, 32, 32, generator=generator)
        return [(image.expand(size, -1, -1, -1), torch.arange(size) % 10) for size in sizes]

    def noise(batch: tuple[torch.Tensor, torch.Tensor], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        return batch[0] + torch.rand(batch[0].shape, generator=generator), batch[1]

    session = ScoringSession(model, list(chosen.values()))
    session.fit(lambda _source: (noise(batch, -1 - number) for number, batch in enumerate(batches(arguments.fit))))
    for number, batch in enumerate(batches(arguments.images)):
        session.run(0, noise(batch, number))
    names = {id(detector): name for name, detector in chosen.items()}
    scores = {names[id(detector)]: {"clean": sets[0]} for detector, sets in session.results().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        write_scores(path, scores, "clean")
        size = path.stat().st_size / 1e6
    print(f"{len(chosen)} detectors: {', '.join(chosen)}")
    print(f"{arguments.images} images in {time.perf_counter() - start:.0f} s, table of {size:.1f} MB")
    print(f"process: {before:.0f} MB before, {peak():.0f} MB at most; target below 2000 MB")


if __name__ == "__main__":
    main()
