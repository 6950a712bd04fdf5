"""Timing two things against each other on a noisy machine."""

import statistics
from collections.abc import Callable, Mapping

__all__ = ("alternate", "report")


def alternate(runs: Mapping[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Call each run ``pairs`` times, interleaved, in the other order every second time.

    Args:
        runs: Name -> a function that returns its own seconds.
        pairs: How often.

    Returns:
        Name -> seconds, in order of the pairs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for pair in range(pairs):
        names = list(runs)
        for name in names if pair % 2 == 0 else reversed(names):
            seconds[name].append(runs[name]())
    return seconds


def report(name: str, seconds: list[float], baseline: list[float]) -> float:
    """Print and return the median of the pairwise ratios, with quartiles."""
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(f"{name:36s} median {middle:.3f}, quartiles {low:.3f} to {high:.3f} ({len(ratios)} pairs)")
    return middle
