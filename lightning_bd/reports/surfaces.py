"""Figures of the loss between networks and around one, from tables."""

import csv
import math
from collections.abc import Iterable, Sequence
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
from numpy.typing import NDArray

__all__ = (
    "interpolation_figure",
    "landscape_figure",
    "plot_interpolation",
    "plot_landscape",
    "plot_sharpness",
    "sharpness_figure",
)

Values = NDArray[np.float64]

# Okabe and Ito's palette: told apart with any kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = "os^D"
_DATA = {"clean": "clean images", "poisoned": "triggered images,\nattacker's label"}
_EXTEND: dict[tuple[bool, bool], Literal["neither", "min", "max", "both"]] = {
    (False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both",
}  # fmt: skip
_OUTLINE: list[AbstractPathEffect] = [withStroke(linewidth=2, foreground="black")]
_UNKNOWN = "attack unknown: no triggered images"
_LOSS = "cross-entropy loss (nats)"


def plot_interpolation(table: Path, figure: Path, names: tuple[str, str] = ("A", "B"), title: str = "") -> None:
    """Draw loss and accuracy on the line between two networks into a file; see :func:`interpolation_figure`.

    Args:
        table: The CSV file.
        figure: The PNG file to write.
        names: Of the two networks.
        title: Above the figure.

    Raises:
        ValueError: As :func:`interpolation_figure`.
    """
    interpolation_figure(table, names, title).savefig(figure)


def plot_landscape(table: Path, figure: Path, title: str = "") -> None:
    """Draw the loss on a plane through a network's weights into a file; see :func:`landscape_figure`.

    Args:
        table: The CSV file.
        figure: The PNG file to write.
        title: Above the figure.

    Raises:
        ValueError: As :func:`landscape_figure`.
    """
    landscape_figure(table, title).savefig(figure)


def plot_sharpness(table: Path, figure: Path, title: str = "") -> None:
    """Draw a network's sharpness into a file; see :func:`sharpness_figure`.

    Args:
        table: The CSV file.
        figure: The PNG file to write.
        title: Above the figure.

    Raises:
        ValueError: As :func:`sharpness_figure`.
    """
    sharpness_figure(table, title).savefig(figure)


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
    rows = _read(table, ("position", "clean_loss", "clean_accuracy"), "interpolate A B")
    positions = _numbers(table, rows, "position", finite=True)
    order = np.argsort(positions, kind="stable")
    canvas = _canvas(9, 4.4, title)
    panels = canvas.subplots(1, 2)
    shown = (
        (("clean_loss", "clean images"), ("poisoned_loss", "triggered images, attacker's label")),
        (("clean_accuracy", "clean accuracy"), ("attack_success_rate", "attack success rate")),
    )
    for axes, factor, series in zip(panels, (1, 100), shown, strict=True):
        drawn = {}
        for number, (column, label) in enumerate(series):
            if _has(rows, column):
                values = factor * _numbers(table, rows, column)[order]
                drawn[label] = np.where(np.isfinite(values), values, np.nan)
                _curve(axes, positions[order], drawn[label], number, label)
        missing = sum(int(np.isnan(values).sum()) for values in drawn.values())
        notes = [_UNKNOWN] * (len(drawn) == 1) + [f"{missing} values are not finite: gaps"] * (missing > 0)
        axes.set_xlabel("position on the line (0: first, 1: second)")
        axes.set_xlim(min(0.0, positions.min()) - 0.05, max(1.0, positions.max()) + 0.05)
        if factor == 100:
            axes.set_ylim(0, 105)
            axes.set_ylabel("share of images (%)")
        else:
            _scale_losses(axes, list(drawn.values()))
        _finish(axes)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8,
                    title="\n".join(notes) or None, title_fontsize=8)  # fmt: skip
    canvas.supxlabel(f"first: {_short(names[0])}      second: {_short(names[1])}", fontsize=9, parse_math=False)
    return canvas


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
    rows = _read(table, ("alpha", "beta", "clean_loss"), "landscape CKPT")
    alphas, rows_of = np.unique(_numbers(table, rows, "alpha", finite=True), return_inverse=True)
    betas, columns_of = np.unique(_numbers(table, rows, "beta", finite=True), return_inverse=True)
    if len(alphas) < 2 or len(betas) < 2:
        raise ValueError(
            f"{table} has {len(alphas)} x {len(betas)} points, but contours take at least 2 x 2. Compute a finer grid."
        )
    grids = {}
    for column, label in (("clean_loss", "clean images"), ("poisoned_loss", "triggered images, attacker's label")):
        if _has(rows, column):
            grid = np.full((len(betas), len(alphas)), np.nan)
            grid[columns_of, rows_of] = _numbers(table, rows, column)
            grids[label] = grid
    canvas = _canvas(1.7 + 4.1 * len(grids), 4.6, title)
    panels = canvas.subplots(1, len(grids), sharex=True, sharey=True, squeeze=False)[0]
    scale = _scale_of(np.concatenate([grid.ravel() for grid in grids.values()]))
    for axes, (label, grid) in zip(panels, grids.items(), strict=True):
        _contours(axes, alphas, betas, grid, scale)
        axes.set_title(label if len(grids) == 2 else f"{label}\n{_UNKNOWN}", fontsize=10)
        axes.set_xlabel("direction 1 (filter-normalised)")
    panels[0].set_ylabel("direction 2 (filter-normalised)")
    colors = ScalarMappable(scale.norm, "viridis")
    bar = canvas.colorbar(colors, ax=list(panels), label=_LOSS, ticks=scale.places, pad=0.02)
    bar.ax.set_yticklabels([f"{level:g}" for level in scale.levels])
    return canvas


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
    rows = _read(table, ("data", "loss", "top_eigenvalue", "converged", "rho", "worst_loss"), "sharpness CKPT")
    eigenvalues = _numbers(table, rows, "top_eigenvalue")
    losses, worst = _numbers(table, rows, "loss"), _numbers(table, rows, "worst_loss")
    radii = list(dict.fromkeys(f"{radius:g}" for radius in _numbers(table, rows, "rho")))
    known = any(row["data"] == "poisoned" for row in rows)
    canvas = _canvas(3.2 + 2.6 * max(2, len(rows)), 4.2, title)
    curvature, ball = canvas.subplots(1, 2)
    settled = [row["converged"].strip().lower() in ("true", "1") for row in rows]
    for place in range(len(rows)):
        _point(curvature, place, eigenvalues[place], filled=settled[place], side="center")
        _point(ball, place, losses[place], filled=False, side="top")
        _point(ball, place, worst[place], filled=True, side="bottom")
        if math.isfinite(losses[place]) and math.isfinite(worst[place]):
            ball.plot([place, place], [losses[place], worst[place]], color=_COLORS[place % 4], zorder=2)
    for axes, values in ((curvature, eigenvalues), (ball, np.concatenate([losses, worst]))):
        _scale_points(axes, values)
        axes.set_xlim(-0.5, len(rows) - 0.1)
        axes.set_xticks(range(len(rows)), [_DATA.get(row["data"], row["data"]) for row in rows])
        axes.set_xlabel("measured on")
        _finish(axes)
    curvature.set_ylabel("largest Hessian eigenvalue")
    ball.set_ylabel(_LOSS)
    ball.set_title(
        f"hollow: at the weights; filled: worst found\nat a distance of at most {' / '.join(radii)}", fontsize=9
    )
    hollow = "" if all(settled) else "\nhollow: not converged"
    curvature.set_title(f"largest in magnitude, with its sign{hollow}", fontsize=9)
    if not known:
        canvas.supxlabel(_UNKNOWN, fontsize=9)
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


def _curve(axes: Axes, positions: Values, values: Values, number: int, label: str) -> None:
    axes.plot(
        positions,
        values,
        ("-", "--")[number],
        color=_COLORS[number],
        marker=_MARKERS[number],
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
    axes.set_ylabel(_LOSS)
    if highest > 20:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylabel(f"{_LOSS}, logarithmic above 1")
    if not len(values) or values.min() >= 0:
        axes.set_ylim(0, highest * (2 if highest > 20 else 1.05) or 1)


def _point(axes: Axes, place: int, value: float, filled: bool, side: Literal["center", "bottom", "top"]) -> None:
    color = _COLORS[place % len(_COLORS)]
    if math.isfinite(value):
        face = color if filled else "white"
        axes.plot(place, value, _MARKERS[place % len(_MARKERS)], color=color, mfc=face, markersize=9, zorder=3)
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


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _canvas(width: float, height: float, title: str) -> Figure:
    canvas = Figure(figsize=(width, height), dpi=150, layout="constrained")
    if title:
        canvas.suptitle(title, fontsize=10, parse_math=False)
    return canvas


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"…{name[-47:]}"


def _read(table: Path, columns: Sequence[str], command: str) -> list[dict[str, str]]:
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


def _has(rows: list[dict[str, str]], column: str) -> bool:
    return any(row.get(column, "").strip() for row in rows)


def _numbers(table: Path, rows: list[dict[str, str]], column: str, finite: bool = False) -> Values:
    numbers = []
    for line, row in enumerate(rows, start=2):
        cell = row[column].strip()
        try:
            number = float(cell or "nan")
        except ValueError:
            raise ValueError(f"{table}, line {line}: expected `{column}` to be a number, but got {cell!r}.") from None
        if finite and not math.isfinite(number):
            raise ValueError(f"{table}, line {line}: expected `{column}` to be a finite number, but got {cell!r}.")
        numbers.append(number)
    return np.array(numbers)
