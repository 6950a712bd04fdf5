"""Figure of loss and accuracy on the line between two networks."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_bd.reports.panels import (
    COLORS,
    LOSS,
    MARKERS,
    UNKNOWN,
    Values,
    canvas_of,
    finish,
    has_values,
    numbers,
    read_table,
)

__all__ = ("interpolation_figure",)


def interpolation_figure(table: Path, names: tuple[str, str] = ("A", "B"), title: str = "") -> Figure:
    """Draw loss and accuracy on the line between two networks: clean images, and triggered ones where they are known.

    Losses above 1 are on a logarithmic scale if the largest is above 20. Values that are not finite leave a gap, and
    the figure counts them.

    Args:
        table: CSV with columns ``position`` (0 is the first network, 1 the second), ``clean_loss`` and
            ``clean_accuracy``, and, empty or absent if the attack is unknown, ``poisoned_loss`` (triggered images,
            attacker's labels) and ``attack_success_rate``; rates in [0, 1].
        names: Of the two networks.
        title: Above the figure.

    Returns:
        A figure without a window, for ``savefig`` or TensorBoard's ``add_figure``.

    Raises:
        ValueError: If the file is missing or empty, lacks a column, or holds what is not a number.
    """
    rows = read_table(table, ("position", "clean_loss", "clean_accuracy"), "interpolate A B")
    positions = numbers(table, rows, "position", finite=True)
    order = np.argsort(positions, kind="stable")
    canvas = canvas_of(9, 4.4, title)
    panels = canvas.subplots(1, 2)
    shown = (
        (("clean_loss", "clean images"), ("poisoned_loss", "triggered images, attacker's label")),
        (("clean_accuracy", "clean accuracy"), ("attack_success_rate", "attack success rate")),
    )
    for axes, factor, series in zip(panels, (1, 100), shown, strict=True):
        drawn = {}
        for number, (column, label) in enumerate(series):
            if has_values(rows, column):
                values = factor * numbers(table, rows, column)[order]
                drawn[label] = np.where(np.isfinite(values), values, np.nan)
                _curve(axes, positions[order], drawn[label], number, label)
        missing = sum(int(np.isnan(values).sum()) for values in drawn.values())
        notes = [UNKNOWN] * (len(drawn) == 1) + [f"{missing} values are not finite: gaps"] * (missing > 0)
        axes.set_xlabel("position on the line (0: first, 1: second)")
        axes.set_xlim(min(0.0, positions.min()) - 0.05, max(1.0, positions.max()) + 0.05)
        if factor == 100:
            axes.set_ylim(0, 105)
            axes.set_ylabel("share of images (%)")
        else:
            _scale_losses(axes, list(drawn.values()))
        finish(axes)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8,
                    title="\n".join(notes) or None, title_fontsize=8)  # fmt: skip
    canvas.supxlabel(f"first: {_short(names[0])}      second: {_short(names[1])}", fontsize=9, parse_math=False)
    return canvas


def _curve(axes: Axes, positions: Values, values: Values, number: int, label: str) -> None:
    axes.plot(
        positions,
        values,
        ("-", "--")[number],
        color=COLORS[number],
        marker=MARKERS[number],
        markersize=5,
        markevery=max(1, len(values) // 20),
        label=label,
        clip_on=False,
        zorder=3,
    )


def _scale_losses(axes: Axes, curves: list[Values]) -> None:
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    highest = float(values.max()) if len(values) else 1.0
    axes.set_ylabel(LOSS)
    if highest > 20:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylabel(f"{LOSS}, logarithmic above 1")
    if not len(values) or values.min() >= 0:
        axes.set_ylim(0, highest * (2 if highest > 20 else 1.05) or 1)


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"…{name[-47:]}"
