"""Means and deviations over seeds, as Markdown."""

import statistics
from collections.abc import Sequence

__all__ = ("mean_and_deviation", "print_markdown")


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return ``mean ± standard deviation`` with one decimal; a dash without values, no deviation of one value."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def print_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
