"""Figures of detectors: histograms and ROC curves of their scores, and the images they find suspicious."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from numpy.typing import ArrayLike, NDArray

from lightning_bd.reports.panels import COLORS, Values, canvas_of, finish

__all__ = ("detection_figures", "roc_curve", "suspicious_grid")

_FACTS = ("index", "set", "label", "prediction", "positive")
_SERIES = (*COLORS, "#E69F00", "#56B4E9", "#000000", "#999999")
_LINES = ("-", "--", "-.", ":")
_BINS = 60
# The smallest false positive rate that the logarithmic panels show.
_FLOOR = 1e-3

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Group:
    """Images that are drawn alike: those of one set that are to be found, or those that are not."""

    name: str
    rows: Mask
    negatives: Mask | None = None  # what its ROC curve is against; None if it is itself not to be found


def detection_figures(scores: Path, folder: Path) -> list[Path]:
    """Draw how detectors score each set of images: ``histogram_<detector>.png`` for each, and one ``roc.png``.

    Histograms show the densities of all sets between the smallest 0.5 and the largest 99.5 percentile of any, on a
    logarithmic axis, per factor of ten, where these are positive and more than a factor of 100 apart. A set
    of which all images are to be found is compared with all the images that are not, one that holds both kinds with
    its own; sets that a detector did not score are left out. ``roc.png`` has a panel for each set to be found, and a
    second one with a logarithmic axis of false alarms from 0.001; it is not written if there is no such set.

    Args:
        scores: Parquet table with columns ``index`` (int), ``set`` (string), ``label``, ``prediction`` (int) and
            ``positive`` (bool, whether the image is to be found), then a float column for each detector: higher is
            more suspicious, NaN or null where it did not score the image.
        folder: Where to write; made if it is missing.

    Returns:
        The files that were written.

    Raises:
        ValueError: If the file is missing, is no parquet table, lacks a column, or has no row or no detector.
    """
    table = _open(scores)
    detectors = _detectors(scores, table)
    groups = _groups(scores, table)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    curves: dict[str, dict[str, tuple[Values, Values, float]]] = {group.name: {} for group in groups if _sought(group)}
    for detector in detectors:
        values = _numbers(table, detector)
        known = {group.name: values[group.rows & ~np.isnan(values)] for group in groups}
        known = {name: found for name, found in known.items() if len(found)}
        if not known:
            continue
        written.append(folder / f"histogram_{re.sub(r'[^A-Za-z0-9_.-]', '_', detector)}.png")
        colors = {group.name: _SERIES[number % len(_SERIES)] for number, group in enumerate(groups)}
        _histogram(detector, known, colors).savefig(written[-1])
        for group in groups:
            if group.negatives is None or group.name not in known:
                continue
            normal = values[group.negatives & ~np.isnan(values)]
            if len(normal):
                positives = np.arange(len(known[group.name]) + len(normal)) < len(known[group.name])
                curves[group.name][detector] = roc_curve(np.concatenate([known[group.name], normal]), positives)
    curves = {name: lines for name, lines in curves.items() if lines}
    if curves:
        written.append(folder / "roc.png")
        _roc_figure(curves, detectors).savefig(written[-1])
    return written


def suspicious_grid(images: ArrayLike, captions: Sequence[str], path: Path, title: str = "") -> None:
    """Draw images with a caption each, such as the most suspicious ones of a training set.

    Args:
        images: ``(N, C, H, W)`` in [0, 1], C being 1 or 3; an array, or a tensor on the CPU.
        captions: One per image, of a few words; several lines are allowed.
        path: The PNG file to write.
        title: Above the figure.

    Raises:
        ValueError: If there is no image, their shape is another, or there are not as many captions.
    """
    pictures: Values = np.asarray(images, dtype=np.float64)
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or not len(pictures):
        raise ValueError(f"Expected argument `images` to be (N, 1 or 3, H, W) with N > 0, but got {pictures.shape}.")
    if len(captions) != len(pictures):
        raise ValueError(f"Expected one caption for each of {len(pictures)} images, but got {len(captions)}.")
    columns = min(8, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    height = pictures.shape[2] / pictures.shape[3]
    # A title needs some width of its own.
    width = max(1.25 * columns, 4.0)
    canvas = canvas_of(width, rows * (1.15 * height + 0.14 * lines + 0.08) + 0.3 * bool(title), title)
    panels = canvas.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, image, caption in zip(panels, pictures, captions, strict=False):
        shown = np.clip(image, 0, 1).transpose(1, 2, 0)
        axes.imshow(shown[..., 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1, aspect="equal")
        axes.set_title(caption, fontsize=7, pad=2, parse_math=False)
    canvas.savefig(path)


def roc_curve(scores: Values, positives: Mask) -> tuple[Values, Values, float]:
    """Return the ROC curve of scores, and the area under it.

    Equal scores are one step, a straight line, so that the area is the probability that a positive image scores
    higher than another one, ties counting a half.

    Args:
        scores: ``(N,)``, higher is more suspicious, without NaN.
        positives: ``(N,)``, at least one true and one false.

    Returns:
        Rates of false alarms and of hits, both from 0 to 1, and the area.

    Example:
        >>> alarms, hits, area = roc_curve(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))
        >>> alarms.tolist(), hits.tolist(), area
        ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0], 0.875)
    """
    order = np.argsort(-scores, kind="stable")
    ordered, found = scores[order], np.cumsum(positives[order])
    # The last image of each run of equal scores.
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    hits = np.append(0, found[ends]) / found[-1]
    alarms = np.append(0, ends + 1 - found[ends]) / (len(ordered) - found[-1])
    area = float(np.sum(np.diff(alarms) * (hits[1:] + hits[:-1])) / 2)
    return alarms, hits, area


def _open(scores: Path) -> pq.ParquetFile:
    if not scores.is_file():
        raise ValueError(f"There is no {scores}. Pass a table of scores, in parquet.")
    try:
        return pq.ParquetFile(scores)
    except pa.ArrowException as error:
        raise ValueError(f"{scores} is not a readable parquet table: {error}.") from error


def _detectors(scores: Path, table: pq.ParquetFile) -> list[str]:
    """Return the names of the float columns, after looking at the others."""
    schema = table.schema_arrow
    missing = [f"`{name}`" for name in _FACTS if name not in schema.names]
    if missing:
        raise ValueError(
            f"{scores} lacks the column {', '.join(missing)}; it has {', '.join(schema.names) or 'none'}."
            " A table of scores has all of them."
        )
    if not table.metadata.num_rows:
        raise ValueError(f"{scores} has no row: no image was scored.")
    detectors = [field.name for field in schema if field.name not in _FACTS and pa.types.is_floating(field.type)]
    if not detectors:
        raise ValueError(f"{scores} has no column of a detector's scores beside {', '.join(_FACTS)}.")
    return detectors


def _column(table: pq.ParquetFile, name: str) -> pa.Array:
    """Read one column alone: a table may be larger than is needed at once."""
    column = table.read(columns=[name]).column(0).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _numbers(table: pq.ParquetFile, name: str) -> Values:
    column = _column(table, name).cast(pa.float64())
    values: Values = column.to_numpy(zero_copy_only=False)
    return values


def _groups(scores: Path, table: pq.ParquetFile) -> list[_Group]:
    sets = _column(table, "set").cast(pa.string()).dictionary_encode()
    flags = _column(table, "positive")
    if sets.null_count or flags.null_count or not pa.types.is_boolean(flags.type):
        raise ValueError(f"{scores} has rows without a `set`, or whose `positive` is neither true nor false.")
    codes = sets.indices.to_numpy(zero_copy_only=False)
    positive: Mask = flags.to_numpy(zero_copy_only=False)
    groups = []
    for code, name in enumerate(sets.dictionary.to_pylist()):
        rows = codes == code
        normal, sought = rows & ~positive, rows & positive
        if normal.any():
            groups.append(_Group(name, normal))
        if sought.any():
            mixed = bool(normal.any())
            groups.append(_Group(f"{name}, positive" if mixed else name, sought, normal if mixed else ~positive))
    return groups


def _sought(group: _Group) -> bool:
    return group.negatives is not None


def _histogram(detector: str, known: dict[str, Values], colors: dict[str, str]) -> Figure:
    finite = [values[np.isfinite(values)] for values in known.values()]
    ends = np.array([np.percentile(values, (0.5, 99.5)) for values in finite if len(values)])
    low, high = (float(ends[:, 0].min()), float(ends[:, 1].max())) if len(ends) else (0.0, 0.0)
    if not high > low:
        room = max(abs(low), 1.0) * 0.5  # one value alone
        low, high = low - room, high + room
    # Softmax probabilities and distances pile up at one end of a linear axis.
    logarithmic = low > 0 and high > 100 * low
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    width = math.log10(edges[1] / edges[0]) if logarithmic else edges[1] - edges[0]
    canvas = canvas_of(7.6, 3.6, detector)
    axes = canvas.add_subplot()
    for name, values in known.items():
        counts, _ = np.histogram(values, edges)
        # Of all scores: what lies outside the bins is missing from the area.
        density = counts / (len(values) * width)
        axes.stairs(density, edges, fill=True, alpha=0.22, color=colors[name])
        axes.stairs(density, edges, color=colors[name], linewidth=1.4, label=f"{name} (n = {len(values):,})")
    axes.set_xlabel("score (higher is more suspicious)")
    axes.set_ylabel("density per factor of ten" if logarithmic else "density")
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(low, high)
    finish(axes)
    _plain(canvas.legend(loc="outside right upper", frameon=False, fontsize=8))
    return canvas


def _roc_figure(curves: dict[str, dict[str, tuple[Values, Values, float]]], detectors: list[str]) -> Figure:
    longest = max(len(lines) for lines in curves.values())
    canvas = canvas_of(max(3.5 * len(curves), 4.2), 6.2 + 0.17 * longest, "")
    panels = canvas.subplots(2, len(curves), squeeze=False, sharey=True)
    for column, (name, lines) in enumerate(curves.items()):
        linear, logarithmic = panels[:, column]
        for detector, (alarms, hits, area) in sorted(lines.items(), key=lambda item: -item[1][2]):
            number = detectors.index(detector)
            # Colours that come again have another line.
            color, line = _SERIES[number % len(_SERIES)], _LINES[(number + number // len(_SERIES)) % len(_LINES)]
            linear.plot(alarms, hits, line, color=color, linewidth=1.5, label=f"{detector}: {area:.3f}")
            places = np.union1d(np.geomspace(_FLOOR, 1, 400), alarms[alarms >= _FLOOR])
            logarithmic.plot(places, np.interp(places, alarms, hits), line, color=color, linewidth=1.5)
        chance = np.geomspace(_FLOOR, 1, 200)
        for axes in (linear, logarithmic):
            axes.plot(chance, chance, color="0.6", linewidth=0.8, zorder=1)
            axes.set_ylim(-0.02, 1.02)
            axes.tick_params(labelsize=8)
            finish(axes)
        logarithmic.set_xscale("log")
        logarithmic.set_xlim(_FLOOR, 1)
        logarithmic.set_xlabel("false positive rate")
        linear.set_xlim(-0.02, 1.02)
        linear.set_title(name, fontsize=10, parse_math=False)
        below = (0.5, -0.1)
        _plain(
            linear.legend(
                loc="upper center", bbox_to_anchor=below, frameon=False, fontsize=8, title="AUROC", title_fontsize=8
            )
        )
    for axes in panels[:, 0]:
        axes.set_ylabel("true positive rate")
    return canvas


def _plain(legend: Legend) -> None:
    """Show names as they are; a dollar sign would start a formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)
