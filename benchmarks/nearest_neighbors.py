"""Time of the scores by k nearest neighbours against the matrix product alone and pytorch-ood's.

python benchmarks/nearest_neighbors.py
python benchmarks/nearest_neighbors.py --device cuda --pairs 20
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _pairs import alternate, report
from torch import Tensor

from lightning_bd.callbacks.detection.k_nearest_neighbors import KNearestNeighbors

try:
    from pytorch_ood.detector import KNN
except ImportError:
    KNN = None


def timed(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Return a function that gives the wall time of one call, device included."""

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def exact(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Distances to the k-th neighbour, all in float64."""
    units = F.normalize(bank.double())
    parts = [
        torch.cdist(F.normalize(part.double()), units).topk(k, dim=1, largest=False).values[:, -1]
        for part in torch.split(queries, 500)
    ]
    return torch.cat(parts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory", type=int, default=None)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device, k = torch.device(arguments.device), arguments.k
    # Around ten centres, as the features of ten classes.
    centres = 3.0 * torch.randn(10, arguments.features)
    bank, queries = (
        (centres[torch.randint(10, (count,))] + torch.randn(count, arguments.features)).relu().to(device)
        for count in (arguments.bank, arguments.queries)
    )
    labels = torch.zeros(len(bank), dtype=torch.long, device=device)

    detector = KNearestNeighbors(k=k, max_memory=arguments.max_memory)
    detector.fit(bank, torch.zeros(len(bank), 1, device=device), labels)
    logits = torch.zeros(len(queries), 1, device=device)
    units, bank_units = F.normalize(queries), F.normalize(bank)
    runs = {
        "product": timed(lambda: units @ bank_units.T, device),
        "ours": timed(lambda: detector.score(queries, logits), device),
    }
    scores = detector.score(queries, logits).double()  # also the warm-up
    print(f"device {device}, {len(queries)} queries, bank {tuple(bank.shape)}, k {k}, {arguments.threads} threads")
    print(f"largest difference to float64       {float((scores - exact(queries, bank, k)).abs().max()):.1e}")
    if KNN is not None:
        # Same k and normalisation; its search runs on the CPU.
        other = KNN(None, k=k, normalize=True).fit_features(bank.cpu(), labels.cpu())
        theirs = other.predict_features(queries).to(device)
        print(f"largest difference to pytorch-ood's {float((scores - theirs).abs().max()):.1e}")
        runs["pytorch-ood"] = timed(lambda: other.predict_features(queries), device)
    runs["product"]()
    seconds = alternate(runs, arguments.pairs)
    for name, values in seconds.items():
        print(f"{name:36s} median {statistics.median(values):.3f} s")
    report("ours / product", seconds["ours"], seconds["product"])
    if KNN is not None:
        report("pytorch-ood / ours", seconds["pytorch-ood"], seconds["ours"])
        report("pytorch-ood / product", seconds["pytorch-ood"], seconds["product"])


if __name__ == "__main__":
    main()
