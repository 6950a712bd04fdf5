"""Figures of a run's results, of the stages of a defense, and of a study of learning rates."""

import csv
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ("plot_learning_rates", "plot_results", "plot_stages", "read_rows")

# Okabe and Ito's palette: told apart with any kind of colour vision.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_SERIES = (_ORANGE, _BLUE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "so^Dv<>P"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file's rows.

    Args:
        path: Such as a run's ``results.csv``.

    Raises:
        ValueError: If the file is missing or has no row.
    """
    if not path.is_file():
        raise ValueError(f"There is no {path}. A run writes results.csv into its folder after each phase.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no row yet: no phase has finished.")
    return rows


def plot_results(results: Path, figure: Path, title: str = "") -> None:
    """Draw clean accuracy, attack success and robust accuracy after each phase as bars.

    Args:
        results: A run's ``results.csv``.
        figure: The PNG file to write.
        title: Above the figure.
    """
    rows = read_rows(results)
    canvas = Figure(figsize=(1.8 + 1.25 * len(rows), 4.2), dpi=150, layout="constrained")
    axes = canvas.add_subplot()
    series = (
        ("clean_accuracy", "clean accuracy", _BLUE, ""),
        ("attack_success_rate", "attack success rate", _ORANGE, "//"),
        ("robust_accuracy", "robust accuracy", _GREEN, ".."),
    )
    for number, (column, label, color, hatch) in enumerate(series):
        known = [(place, 100 * float(row[column])) for place, row in enumerate(rows) if row[column]]
        places = [place + 0.27 * (number - 1) for place, _ in known]
        values = [value for _, value in known]
        bars = axes.bar(places, values, 0.25, label=label, color=color, hatch=hatch, edgecolor="white")
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    names = [f"{row['phase']}\nfrom {row['start_from']}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    _percent_axis(axes, "test images (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=3, frameon=False, fontsize=8)
    if title:
        canvas.suptitle(title, fontsize=10)
    canvas.savefig(figure)


def plot_learning_rates(study: Path, figure: Path, title: str = "") -> None:
    """Draw attack success and clean accuracy after fine-tuning over its learning rate: mean and range over seeds.

    Args:
        study: CSV with columns ``model``, ``learning_rate``, ``seed``, ``clean_accuracy``, ``attack_success_rate``.
        figure: The PNG file to write.
        title: Above the figure.

    Raises:
        ValueError: If the file is missing or empty, or has more models than can be told apart.
    """
    rows = read_rows(study)
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) > len(_SERIES):
        raise ValueError(f"Expected at most {len(_SERIES)} models in one figure, but {study} has {len(models)}.")
    canvas = Figure(figsize=(8, 3.8 + 0.22 * max(0, len(models) - 3)), dpi=150, layout="constrained")
    panels = canvas.subplots(1, 2)
    rates = sorted({float(row["learning_rate"]) for row in rows})
    seeds = len({row["seed"] for row in rows})
    # Side by side, so that bars of one rate do not hide each other.
    step = 0.0 if len(models) <= 3 else 0.08
    panels_shown = (("attack_success_rate", "attack success rate (%)"), ("clean_accuracy", "clean accuracy (%)"))
    for axes, (column, label) in zip(panels, panels_shown, strict=True):
        for number, model in enumerate(models):
            color, marker = _SERIES[number], _MARKERS[number]
            groups = [
                [100 * float(r[column]) for r in rows if r["model"] == model and float(r["learning_rate"]) == rate]
                for rate in rates
            ]
            # A model may have been tried at some of the rates only.
            places = [place + step * (number - (len(models) - 1) / 2) for place, group in enumerate(groups) if group]
            groups = [group for group in groups if group]
            means = [statistics.mean(group) for group in groups]
            below = [mean - min(group) for mean, group in zip(means, groups, strict=True)]
            above = [max(group) - mean for mean, group in zip(means, groups, strict=True)]
            axes.errorbar(
                places, means, yerr=(below, above), label=model, color=color, marker=marker, capsize=3, markersize=5
            )
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_xlabel("learning rate of fine-tuning")
        axes.margins(x=0.06)
        _percent_axis(axes, label)
    if step:
        handles, labels = panels[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    else:
        panels[0].legend(frameon=False, loc="lower left", fontsize=9)
    several = f"up to {seeds} seeds" if len(models) > 3 else f"{seeds} seeds"
    canvas.suptitle(f"{title} (mean and range of {several})".strip(), fontsize=10)
    canvas.savefig(figure)


def plot_stages(stages: Path, figure: Path, title: str = "") -> None:
    """Draw clean accuracy and attack success along the stages of a defense, such as the share of pruned channels.

    Args:
        stages: CSV with columns ``axis`` (what the position is), ``position``, ``clean_accuracy``,
            ``attack_success_rate``; the last is empty where the attack is not known.
        figure: The PNG file to write.
        title: Above the figure.
    """
    rows = read_rows(stages)
    canvas = Figure(figsize=(5.2, 3.6), dpi=150, layout="constrained")
    axes = canvas.add_subplot()
    series = (
        ("clean_accuracy", "clean accuracy", _BLUE, "o", "-"),
        ("attack_success_rate", "attack success rate", _ORANGE, "s", "--"),
    )
    for column, label, color, marker, line in series:
        known = [(float(row["position"]), 100 * float(row[column])) for row in rows if row[column]]
        if known:
            axes.plot(*zip(*known, strict=True), line, label=label, color=color, marker=marker, markersize=4)
    axes.set_xlabel(rows[0]["axis"])
    _percent_axis(axes, "test images (%)")
    unknown = not any(row["attack_success_rate"] for row in rows)
    axes.legend(loc="best", frameon=False, fontsize=8, title="attack unknown" if unknown else None)
    if title:
        canvas.suptitle(title, fontsize=10)
    canvas.savefig(figure)


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(0, 105)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
