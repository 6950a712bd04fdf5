"""Figure of a network's largest Hessian eigenvalue and its loss in a ball."""

import math
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_bd.reports.panels import COLORS, LOSS, MARKERS, UNKNOWN, Values, canvas_of, finish, numbers, read_table

__all__ = ("sharpness_figure",)

_DATA = {"clean": "clean images", "poisoned": "triggered images,\nattacker's label"}


def sharpness_figure(table: Path, title: str = "") -> Figure:
    """Draw a network's largest Hessian eigenvalue and its loss in a ball, for each set of data.

    A scale is logarithmic if all values are positive and span more than a factor of 20; the numbers are written beside
    the points. An eigenvalue that has not converged is a hollow point.

    Args:
        table: CSV with a row for each set of data, ``clean`` and, if the attack is known, ``poisoned``, and columns
            ``data``, ``loss``, ``top_eigenvalue``, ``converged`` (True or False), ``rho``, ``worst_loss``.
        title: Above the figure.

    Returns:
        A figure without a window, for ``savefig`` or TensorBoard's ``add_figure``.

    Raises:
        ValueError: If the file is missing or empty, lacks a column, or holds what is not a number.
    """
    rows = read_table(table, ("data", "loss", "top_eigenvalue", "converged", "rho", "worst_loss"), "sharpness CKPT")
    eigenvalues = numbers(table, rows, "top_eigenvalue")
    losses, worst = numbers(table, rows, "loss"), numbers(table, rows, "worst_loss")
    radii = list(dict.fromkeys(f"{radius:g}" for radius in numbers(table, rows, "rho")))
    known = any(row["data"] == "poisoned" for row in rows)
    canvas = canvas_of(3.2 + 2.6 * max(2, len(rows)), 4.2, title)
    curvature, ball = canvas.subplots(1, 2)
    settled = [row["converged"].strip().lower() in ("true", "1") for row in rows]
    for place in range(len(rows)):
        _point(curvature, place, eigenvalues[place], filled=settled[place], side="center")
        _point(ball, place, losses[place], filled=False, side="top")
        _point(ball, place, worst[place], filled=True, side="bottom")
        if math.isfinite(losses[place]) and math.isfinite(worst[place]):
            ball.plot([place, place], [losses[place], worst[place]], color=COLORS[place % 4], zorder=2)
    for axes, values in ((curvature, eigenvalues), (ball, np.concatenate([losses, worst]))):
        _scale_points(axes, values)
        axes.set_xlim(-0.5, len(rows) - 0.1)
        axes.set_xticks(range(len(rows)), [_DATA.get(row["data"], row["data"]) for row in rows])
        axes.set_xlabel("measured on")
        finish(axes)
    curvature.set_ylabel("largest Hessian eigenvalue")
    ball.set_ylabel(LOSS)
    ball.set_title(
        f"hollow: at the weights; filled: worst found\nat a distance of at most {' / '.join(radii)}", fontsize=9
    )
    hollow = "" if all(settled) else "\nhollow: not converged"
    curvature.set_title(f"largest in magnitude, with its sign{hollow}", fontsize=9)
    if not known:
        canvas.supxlabel(UNKNOWN, fontsize=9)
    return canvas


def _point(axes: Axes, place: int, value: float, filled: bool, side: Literal["center", "bottom", "top"]) -> None:
    color = COLORS[place % len(COLORS)]
    if math.isfinite(value):
        face = color if filled else "white"
        axes.plot(place, value, MARKERS[place % len(MARKERS)], color=color, mfc=face, markersize=9, zorder=3)
        axes.annotate(f"{value:#.3g}", (place, value), (9, 0), textcoords="offset points", va=side, fontsize=9)
    elif side != "top":  # the one at the weights has a second one above it
        text, height = ("no value", 0.02) if math.isnan(value) else ("infinite", 0.94)
        axes.text(place, height, text, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)


def _scale_points(axes: Axes, values: Values) -> None:
    """Leave room for numbers beside the points, and for words above and below them."""
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        room = float(values.max() / values.min()) ** 0.15
        axes.set_yscale("log")
        axes.set_ylim(values.min() / room, values.max() * room)
    else:
        low, high = values.min(initial=0.0), values.max(initial=0.0)
        span = high - low or 1.0
        axes.set_ylim(low - 0.08 * span, high + 0.15 * span)
        axes.axhline(0, color="0.5", linewidth=0.8, zorder=1)
