"""What the figures of losses share: colours, reading a command's table, panels."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = (
    "COLORS",
    "LOSS",
    "MARKERS",
    "UNKNOWN",
    "Values",
    "canvas_of",
    "finish",
    "has_values",
    "numbers",
    "read_table",
)

Values = NDArray[np.float64]

# Okabe and Ito's palette: told apart with any kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = "os^D"
UNKNOWN = "attack unknown: no triggered images"
LOSS = "cross-entropy loss (nats)"


def finish(axes: Axes) -> None:
    """Take what is not needed from a panel, and add faint lines.

    Args:
        axes: The panel.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def canvas_of(width: float, height: float, title: str) -> Figure:
    """Make a figure without a window.

    Args:
        width: In inches.
        height: In inches.
        title: Above the figure; none if empty.
    """
    canvas = Figure(figsize=(width, height), dpi=150, layout="constrained")
    if title:
        canvas.suptitle(title, fontsize=10, parse_math=False)
    return canvas


def read_table(table: Path, columns: Sequence[str], command: str) -> list[dict[str, str]]:
    """Read the rows of a table that a command wrote.

    Args:
        table: The CSV file.
        columns: Those that it must have.
        command: Which command writes it, for messages.

    Raises:
        ValueError: If it is missing, empty, or lacks a column.
    """
    if not table.is_file():
        raise ValueError(f"There is no {table}. `lightning-bd {command}` writes it.")
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        names, rows = reader.fieldnames or (), list(reader)
    missing = [f"`{column}`" for column in columns if column not in names]
    if missing:
        raise ValueError(
            f"{table} lacks the column {', '.join(missing)}; it has {', '.join(names) or 'none'}."
            f" `lightning-bd {command}` writes a table with all of them."
        )
    if not rows:
        raise ValueError(f"{table} has no row yet. `lightning-bd {command}` writes it anew.")
    return rows


def has_values(rows: list[dict[str, str]], column: str) -> bool:
    """Return whether any row has a value in a column, which may be absent.

    Args:
        rows: Of the table.
        column: Its name.
    """
    return any(row.get(column, "").strip() for row in rows)


def numbers(table: Path, rows: list[dict[str, str]], column: str, finite: bool = False) -> Values:
    """Return a column as numbers; an empty cell is NaN.

    Args:
        table: The CSV file, for messages.
        rows: Its rows.
        column: Name of the column.
        finite: Whether each must be finite.

    Raises:
        ValueError: If a cell is no number, or not finite where it must be.
    """
    found = []
    for line, row in enumerate(rows, start=2):
        cell = row[column].strip()
        try:
            number = float(cell or "nan")
        except ValueError:
            raise ValueError(f"{table}, line {line}: expected `{column}` to be a number, but got {cell!r}.") from None
        if finite and not math.isfinite(number):
            raise ValueError(f"{table}, line {line}: expected `{column}` to be a finite number, but got {cell!r}.")
        found.append(number)
    return np.array(found)
