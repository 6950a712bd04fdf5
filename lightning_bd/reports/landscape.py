"""Figure of the loss on a plane through a network's weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from lightning_bd.reports.panels import LOSS, UNKNOWN, Values, canvas_of, has_values, numbers, read_table

__all__ = ("landscape_figure",)

_EXTEND: dict[tuple[bool, bool], Literal["neither", "min", "max", "both"]] = {
    (False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both",
}  # fmt: skip
_OUTLINE: list[AbstractPathEffect] = [withStroke(linewidth=2, foreground="black")]


def landscape_figure(table: Path, title: str = "") -> Figure:
    """Draw the loss on a plane through a network's weights as contours, clean and triggered images on one scale.

    Levels are spaced logarithmically if the losses span more than a factor of 20. Losses above 100 (ten times the
    lowest one, if that is more) share the topmost colour, and those below a ten-thousandth the lowest; values that are
    not a number are hatched.

    Args:
        table: CSV with a row for each point of a grid: ``alpha``, ``beta``, ``clean_loss`` and, empty or absent if the
            attack is unknown, ``poisoned_loss``; others are not looked at. Points that are missing are hatched.
        title: Above the figure.

    Returns:
        A figure without a window, for ``savefig`` or TensorBoard's ``add_figure``.

    Raises:
        ValueError: If the file is missing or empty, lacks a column, holds what is not a number, or has fewer than two
            steps in a direction.
    """
    rows = read_table(table, ("alpha", "beta", "clean_loss"), "landscape CKPT")
    alphas, rows_of = np.unique(numbers(table, rows, "alpha", finite=True), return_inverse=True)
    betas, columns_of = np.unique(numbers(table, rows, "beta", finite=True), return_inverse=True)
    if len(alphas) < 2 or len(betas) < 2:
        raise ValueError(
            f"{table} has {len(alphas)} x {len(betas)} points, but contours take at least 2 x 2. Compute a finer grid."
        )
    grids = {}
    for column, label in (("clean_loss", "clean images"), ("poisoned_loss", "triggered images, attacker's label")):
        if has_values(rows, column):
            grid = np.full((len(betas), len(alphas)), np.nan)
            grid[columns_of, rows_of] = numbers(table, rows, column)
            grids[label] = grid
    canvas = canvas_of(1.7 + 4.1 * len(grids), 4.6, title)
    panels = canvas.subplots(1, len(grids), sharex=True, sharey=True, squeeze=False)[0]
    scale = _scale_of(np.concatenate([grid.ravel() for grid in grids.values()]))
    for axes, (label, grid) in zip(panels, grids.items(), strict=True):
        _contours(axes, alphas, betas, grid, scale)
        axes.set_title(label if len(grids) == 2 else f"{label}\n{UNKNOWN}", fontsize=10)
        axes.set_xlabel("direction 1 (filter-normalised)")
    panels[0].set_ylabel("direction 2 (filter-normalised)")
    colors = ScalarMappable(scale.norm, "viridis")
    bar = canvas.colorbar(colors, ax=list(panels), label=LOSS, ticks=scale.places, pad=0.02)
    bar.ax.set_yticklabels([f"{level:g}" for level in scale.levels])
    return canvas


@dataclass(frozen=True)
class _Scale:
    """Levels of the loss, and where they lie on a colour bar whose steps are of the same size."""

    levels: list[float]
    logarithmic: bool
    extend: Literal["neither", "min", "max", "both"]

    @property
    def places(self) -> list[float]:
        return [math.log10(level) for level in self.levels] if self.logarithmic else self.levels

    @property
    def norm(self) -> BoundaryNorm:
        return BoundaryNorm(self.places, 256, extend=self.extend)

    def place(self, losses: Values) -> Values:
        """Where losses lie; those beyond the levels just outside, so that contours between neighbours stay smooth."""
        step = (self.levels[-1] - self.levels[0]) / len(self.levels)
        low, high = (
            (self.levels[0] / 10, self.levels[-1] * 10)
            if self.logarithmic
            else (self.levels[0] - step, self.levels[-1] + step)
        )
        inside = np.clip(losses, low, high)
        return np.log10(inside) if self.logarithmic else inside


def _scale_of(losses: Values) -> _Scale:
    known = losses[~np.isnan(losses)]
    finite = known[np.isfinite(known)]
    lowest, highest = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    cap = max(100.0, 10 * lowest)
    top = min(highest, cap)
    bottom = max(lowest, min(1e-4, top / 1e4))
    logarithmic = lowest >= 0 and top > 20 * bottom
    if logarithmic:
        decades = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
        steps = (1, 3) if top > 1e3 * bottom else (1, 2, 5)
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    else:
        bottom, top = lowest, min(highest, cap)
        if top - bottom <= 1e-6 * abs(top):
            pad = abs(top) / 10 or 0.1
            bottom, top = (max(0.0, bottom - pad) if bottom >= 0 else bottom - pad), top + pad
        ticks = [float(f"{tick:.10g}") for tick in MaxNLocator(10).tick_values(bottom, top)]  # 1.2000000000000002
    # From the last one below to the first one above.
    first = max((index for index, tick in enumerate(ticks) if tick <= bottom), default=0)
    last = min((index for index, tick in enumerate(ticks) if tick >= top), default=len(ticks) - 1)
    levels = ticks[first : last + 1]
    below, above = bool((known < levels[0]).any()), bool((known > levels[-1]).any())
    return _Scale(levels, logarithmic, _EXTEND[below, above])


def _contours(axes: Axes, alphas: Values, betas: Values, losses: Values, scale: _Scale) -> None:
    places = np.ma.masked_invalid(scale.place(losses))
    axes.set_xlim(alphas[0], alphas[-1])
    axes.set_ylim(betas[0], betas[-1])
    axes.patch.set(facecolor="0.9", edgecolor="0.6", hatch="////")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if places.count():
        axes.contourf(alphas, betas, places, levels=scale.places, norm=scale.norm, cmap="viridis", extend=scale.extend)
        lines = [place for place in scale.places if places.min() < place < places.max()]
        if lines:
            drawn = axes.contour(
                alphas, betas, places, levels=lines, colors="white", linewidths=0.6, linestyles="solid"
            )
            names = {place: f"{level:g}" for place, level in zip(scale.places, scale.levels, strict=True)}
            _thin_out(axes, axes.clabel(drawn, fmt=names, fontsize=8, colors="white", inline=False))
    if places.mask.any():
        axes.legend(
            handles=[Patch(facecolor="0.9", edgecolor="0.6", hatch="////", label="not a number")],
            loc="lower right",
            fontsize=8,
        )
    if alphas[0] <= 0 <= alphas[-1] and betas[0] <= 0 <= betas[-1]:
        axes.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=13, clip_on=False, zorder=4)
        axes.annotate(
            "model", (0, 0), (0, -8), textcoords="offset points", ha="center", va="top", fontsize=8, color="white",
            path_effects=_OUTLINE, zorder=4,
        )  # fmt: skip


def _thin_out(axes: Axes, labels: Iterable[Text]) -> None:
    """Keep the labels that are clear of the model, of the frame and of each other."""
    to_panel = axes.transData + axes.transAxes.inverted()
    kept = [np.asarray(to_panel.transform((0, 0)))]
    for label in labels:
        label.set_path_effects(_OUTLINE)
        place = np.asarray(to_panel.transform(label.get_position()))
        if place.min() > 0.06 and place.max() < 0.94 and min(np.hypot(*(place - other)) for other in kept) > 0.12:
            kept.append(place)
        else:
            label.remove()
