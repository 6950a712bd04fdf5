"""Figures of losses in weight space: what is drawn, read back from matplotlib's own objects."""

import csv
import math
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_bd.reports import interpolation_figure, landscape_figure, sharpness_figure

LINE = ("position", "clean_loss", "clean_accuracy", "poisoned_loss", "attack_success_rate")
PLANE = ("alpha", "beta", "clean_loss", "clean_accuracy", "poisoned_loss", "attack_success_rate")
SHARP = ("data", "loss", "top_eigenvalue", "converged", "rho", "worst_loss", "sharpness")
POSITIONS = (1.0, 0.0, 0.5)  # sorted when they are drawn
STEPS = np.linspace(-1, 1, 5).tolist()
CLEAN = ("clean", 0.5, 10.0, True, 0.05, 0.75, 0.25)
POISONED = ("poisoned", 0.25, 20.0, True, 0.05, 1.25, 1.0)

Rows = Iterable[Iterable[object]]
Make = Callable[[Path], Figure]


def write(path: Path, columns: Iterable[str], rows: Rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def plane(clean: Callable[[float, float], object], poisoned: Callable[[float, float], object]) -> Rows:
    return [(a, b, clean(a, b), 0.9, poisoned(a, b), 0.8) for a, b in product(STEPS, STEPS)]


def texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def curves(axes: Axes) -> dict[str, list[list[float]]]:
    return {
        str(line.get_label()): np.asarray(line.get_xydata(), dtype=float).T.tolist()
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def rendered(figure: Figure) -> RendererAgg:
    figure.set_dpi(75)  # half of the real one, for speed
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    renderer: RendererAgg = canvas.get_renderer()  # type: ignore[no-untyped-call]
    return renderer


def assert_sound(figure: Figure) -> None:
    """Nothing leaves the figure, every panel is labelled, and neighbouring numbers on an axis do not meet."""
    renderer = rendered(figure)
    box = figure.get_tightbbox(renderer)
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel()
        low, high = sorted(axes.get_xlim())
        boxes = [
            label.get_window_extent(renderer).padded(2)
            for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            if low <= place <= high and label.get_text()
        ]
        assert not any(left.overlaps(right) for left, right in pairwise(boxes))


def test_line_is_sorted_and_in_percent(tmp_path: Path) -> None:
    rows = [(p, 1 + p, 0.9 - 0.1 * p, 0.5 * p, 1 - p) for p in POSITIONS]
    figure = interpolation_figure(write(tmp_path / "a.csv", LINE, rows), (r"one$\frac$", "two"), r"A title $\bad$")
    loss, rates = figure.axes
    for axes, expected in (
        (loss, {"clean images": [1, 1.5, 2], "triggered images, attacker's label": [0, 0.25, 0.5]}),
        (rates, {"clean accuracy": [90, 85, 80], "attack success rate": [100, 50, 0]}),
    ):
        drawn = curves(axes)
        assert list(drawn) == list(expected)
        for label, values in expected.items():
            np.testing.assert_allclose(drawn[label], [[0, 0.5, 1], values])
        # Told apart without colour, too.
        first, second = axes.get_lines()
        assert first.get_marker() != second.get_marker()
        assert first.get_linestyle() != second.get_linestyle()
    assert loss.get_ylabel() == "cross-entropy loss (nats)"
    assert (loss.get_yscale(), loss.get_ylim()[0]) == ("linear", 0)
    assert rates.get_ylabel() == "share of images (%)"
    for words in (
        r"A title $\bad$",
        r"first: one$\frac$      second: two",
        "position on the line (0: first, 1: second)",
    ):
        assert words in texts(figure)
    assert "unknown" not in texts(figure)
    assert "not finite" not in texts(figure)
    assert_sound(figure)


@pytest.mark.parametrize("columns", [LINE, LINE[:3]])
def test_line_of_an_unknown_attack(tmp_path: Path, columns: tuple[str, ...]) -> None:
    rows = [(p, 1e-5, 0.9, "", "")[: len(columns)] for p in POSITIONS]
    figure = interpolation_figure(write(tmp_path / "a.csv", columns, rows))
    assert [list(curves(axes)) for axes in figure.axes] == [["clean images"], ["clean accuracy"]]
    assert "attack unknown: no triggered images" in texts(figure)
    assert "first: A      second: B" in texts(figure)
    assert_sound(figure)


def test_line_with_extreme_values(tmp_path: Path) -> None:
    rows = [(0, 1e6, 0.9, "nan", 1), (0.5, "inf", 0.5, 3, 1), (1, 0, 0.9, 2, "")]
    figure = interpolation_figure(write(tmp_path / "a.csv", LINE, rows), ("x" * 300, "y" * 300))
    loss = figure.axes[0]
    assert loss.get_yscale() == "symlog"
    assert "logarithmic above 1" in loss.get_ylabel()
    np.testing.assert_allclose(curves(loss)["clean images"][1], [1e6, math.nan, 0])
    assert "2 values are not finite: gaps" in texts(figure)
    assert "1 values are not finite: gaps" in texts(figure)
    assert_sound(figure)


@pytest.mark.parametrize("loss", [0, "nan", 1e-9, -1])
def test_line_of_equal_values(tmp_path: Path, loss: object) -> None:
    figure = interpolation_figure(write(tmp_path / "a.csv", LINE, [(p, loss, 1, loss, 0) for p in POSITIONS]))
    low, high = figure.axes[0].get_ylim()
    assert low < high
    assert_sound(figure)
    assert_sound(interpolation_figure(write(tmp_path / "a.csv", LINE, [(0, loss, 1, loss, 0)])))


def test_plane(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", PLANE, plane(lambda a, b: 1.5 + a, lambda a, b: 0.5 + 0.25 * b * b))
    figure = landscape_figure(table, "A title")
    clean, poisoned, bar = figure.axes
    assert clean.get_title() == "clean images"
    assert poisoned.get_title() == "triggered images, attacker's label"
    assert clean.get_xlabel() == poisoned.get_xlabel() == "direction 1 (filter-normalised)"
    assert clean.get_ylabel() == "direction 2 (filter-normalised)"
    assert bar.get_ylabel() == "cross-entropy loss (nats)"
    # The same colours mean the same in both.
    assert norm_of(clean).boundaries.tolist() == norm_of(poisoned).boundaries.tolist() == ticks(figure)
    assert (ticks(figure)[0], ticks(figure)[-1]) == (0.4, 2.6)
    for axes in (clean, poisoned):
        [[x, y]] = [np.asarray(line.get_xydata()).ravel().tolist() for line in axes.get_lines()]
        assert (x, y) == (0, 0)
    assert texts(figure).count("model") == 2
    assert "not a number" not in texts(figure)
    assert_sound(figure)
    assert clean.get_xticks().tolist() == [-1, -0.5, 0, 0.5, 1]


def norm_of(axes: Axes) -> BoundaryNorm:
    norm = axes.collections[0].norm
    assert isinstance(norm, BoundaryNorm)
    return norm


def ticks(figure: Figure) -> list[float]:
    """Numbers on the colour bar."""
    return [float(tick.get_text()) for tick in figure.axes[-1].get_yticklabels()]


def paths_between(axes: Axes, level: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Corners of the coloured areas of one level."""
    return np.asarray(axes.collections[0].get_paths()[level].vertices, dtype=float)


def test_the_first_direction_is_horizontal(tmp_path: Path) -> None:
    """The loss rises with alpha alone: the lowest area is a strip at the left, over the whole height."""
    rows = list(plane(lambda a, b: 1.5 + a, lambda a, b: 1))
    rows = rows[7:] + rows[:7]  # the order of the rows does not matter
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, rows))
    corners = paths_between(figure.axes[0], 0)
    np.testing.assert_allclose([corners[:, 0].min(), corners[:, 0].max()], [-1, ticks(figure)[1] - 1.5])
    np.testing.assert_allclose([corners[:, 1].min(), corners[:, 1].max()], [-1, 1])


@pytest.mark.parametrize("columns", [PLANE, PLANE[:4]])
def test_plane_of_an_unknown_attack(tmp_path: Path, columns: tuple[str, ...]) -> None:
    rows = [list(row)[: len(columns)] for row in plane(lambda a, b: a * a, lambda a, b: "")]
    figure = landscape_figure(write(tmp_path / "a.csv", columns, rows))
    clean, bar = figure.axes
    assert clean.get_title() == "clean images\nattack unknown: no triggered images"
    assert bar.get_ylabel() == "cross-entropy loss (nats)"
    assert_sound(figure)


@pytest.mark.parametrize(
    ("decades", "levels"),
    [(4, [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]), (2, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])],
)
def test_levels_are_logarithmic_where_the_losses_are(tmp_path: Path, decades: float, levels: list[float]) -> None:
    middle = (levels[0] * levels[-1]) ** 0.5
    rows = plane(lambda a, b: middle * 10 ** (decades / 2 * a), lambda a, b: middle)
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, rows))
    assert ticks(figure) == levels
    assert norm_of(figure.axes[0]).extend == "neither"
    # Contours between points are straight in the logarithm: the second level lies where its own logarithm does.
    corners = paths_between(figure.axes[0], 0)
    assert corners[:, 0].max() == pytest.approx(np.log10(levels[1] / middle) * 2 / decades)
    assert_sound(figure)


def test_levels_are_capped(tmp_path: Path) -> None:
    rows = plane(lambda a, b: 1e6 if a == 1 else 1 + a * a, lambda a, b: "inf" if b == 1 else 1e-12)
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, rows))
    assert (ticks(figure)[0], ticks(figure)[-1]) == (1e-4, 100)
    assert norm_of(figure.axes[0]).extend == "both"
    assert "not a number" not in texts(figure)
    assert_sound(figure)


def test_high_losses_are_capped_at_ten_times_the_lowest(tmp_path: Path) -> None:
    rows = plane(lambda a, b: 50 if a < 1 else 1e9, lambda a, b: 60)
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, rows))
    assert ticks(figure)[0] <= 50
    assert ticks(figure)[-1] == 500
    assert norm_of(figure.axes[0]).extend == "max"


@pytest.mark.parametrize("loss", [0, 1.5, "nan", -2, 1e-300])
def test_plane_of_equal_values(tmp_path: Path, loss: object) -> None:
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, plane(lambda a, b: loss, lambda a, b: loss)))
    assert len(set(ticks(figure))) > 1
    assert ticks(figure) == sorted(ticks(figure))
    assert min(ticks(figure)) >= 0 or loss == -2
    assert_sound(figure)


def test_missing_points_are_hatched(tmp_path: Path) -> None:
    rows = [(a, b, 1.5 + a, 0.9, "nan" if a + b < -1 else 1, 0.8) for a, b in product(STEPS, STEPS) if a + b < 1.5]
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, rows))
    assert texts(figure).count("not a number") == 2
    assert all(axes.patch.get_hatch() for axes in figure.axes[:2])
    corners = np.concatenate([paths_between(figure.axes[0], level) for level in range(len(ticks(figure)) - 1)])
    assert corners.sum(axis=1).max() < 1.5 + 1e-6
    assert_sound(figure)


def test_the_model_is_not_drawn_where_it_is_not(tmp_path: Path) -> None:
    rows = [(a + 5, b, 1.5 + a, 0.9, 1, 0.8) for a, b in product(STEPS, STEPS)]
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, rows))
    assert "model" not in texts(figure)
    assert figure.axes[0].get_xlim() == (4, 6)


def test_contour_labels_do_not_meet(tmp_path: Path) -> None:
    """A steep cliff through the model: most labels would be drawn over each other."""
    rows = plane(lambda a, b: 10 ** (8 * min(max(a + 0.1 * b, -0.5), 0.25)), lambda a, b: 10 ** (4 * a))
    figure = landscape_figure(write(tmp_path / "a.csv", PLANE, rows))
    renderer = rendered(figure)
    for axes in figure.axes[:2]:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(boxes) > 1
        assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])


def points(axes: Axes) -> list[tuple[float, float, str]]:
    return [
        (float(np.ravel(line.get_xdata())[0]), float(np.ravel(line.get_ydata())[0]), str(line.get_markerfacecolor()))
        for line in axes.get_lines()
        if line.get_marker() not in ("None", "")
    ]


def test_sharpness(tmp_path: Path) -> None:
    figure = sharpness_figure(write(tmp_path / "a.csv", SHARP, [CLEAN, POISONED]), "A title")
    curvature, ball = figure.axes
    assert [point[:2] for point in points(curvature)] == [(0, 10), (1, 20)]
    assert [point[:2] for point in points(ball)] == [(0, 0.5), (0, 0.75), (1, 0.25), (1, 1.25)]
    assert [point[2] == "white" for point in points(ball)] == [True, False, True, False]
    assert "white" not in {point[2] for point in points(curvature)}
    names = [label.get_text() for label in ball.get_xticklabels()]
    assert names == ["clean images", "triggered images,\nattacker's label"]
    assert curvature.get_ylabel() == "largest Hessian eigenvalue"
    assert ball.get_ylabel() == "cross-entropy loss (nats)"
    for words in ("A title", "10.0", "20.0", "0.500", "0.750", "1.25", "at a distance of at most 0.05"):
        assert words in texts(figure)
    assert "unknown" not in texts(figure)
    assert "converged" not in texts(figure)
    assert {axes.get_yscale() for axes in figure.axes} == {"linear"}
    assert_sound(figure)


def test_sharpness_of_an_unknown_attack_and_not_converged(tmp_path: Path) -> None:
    row = ("clean", 0.5, -3.0, False, 0.05, 0.75, 0.25)
    figure = sharpness_figure(write(tmp_path / "a.csv", SHARP, [row]))
    assert points(figure.axes[0]) == [(0, -3, "white")]
    assert "hollow: not converged" in texts(figure)
    assert "attack unknown: no triggered images" in texts(figure)
    assert_sound(figure)


def test_sharpness_over_orders_of_magnitude(tmp_path: Path) -> None:
    rows = [("clean", 1e-5, 1e6, True, 0.05, 0.1, 0.1), ("poisoned", 1e-3, 1.0, True, 0.05, "inf", "inf")]
    figure = sharpness_figure(write(tmp_path / "a.csv", SHARP, rows))
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert texts(figure).count("infinite") == 1
    assert_sound(figure)


@pytest.mark.parametrize("value", [0, 1e-9, "nan", ""])
def test_sharpness_of_equal_values(tmp_path: Path, value: object) -> None:
    rows = [(name, value, value, True, 0.05, value, value) for name in ("clean", "poisoned")]
    figure = sharpness_figure(write(tmp_path / "a.csv", SHARP, rows))
    assert texts(figure).count("no value") == (4 if value in ("nan", "") else 0)
    assert_sound(figure)


def test_figures_are_written(tmp_path: Path) -> None:
    tables = [
        write(tmp_path / "line.csv", LINE, [(p, 1, 0.9, 2, 1) for p in POSITIONS]),
        write(tmp_path / "plane.csv", PLANE, plane(lambda a, b: 1 + a, lambda a, b: 2 + b)),
        write(tmp_path / "sharp.csv", SHARP, [CLEAN, POISONED]),
    ]
    interpolation_figure(tables[0], ("first", "second"), "A title").savefig(tmp_path / "line.png")
    landscape_figure(tables[1], "A title").savefig(tmp_path / "plane.png")
    sharpness_figure(tables[2], "A title").savefig(tmp_path / "sharp.png")
    for table in tables:
        pixels = np.asarray(Image.open(table.with_suffix(".png")).convert("RGB"))
        assert pixels.shape[1] > 600
        assert len(np.unique(pixels[::4, ::4].reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("make", [interpolation_figure, landscape_figure, sharpness_figure])
def test_tables_that_cannot_be_drawn(make: Make, tmp_path: Path) -> None:
    columns = {interpolation_figure: LINE, landscape_figure: PLANE, sharpness_figure: SHARP}[make]
    command = {interpolation_figure: "interpolate A B", landscape_figure: "landscape", sharpness_figure: "sharpness"}
    table = tmp_path / "a.csv"
    with pytest.raises(ValueError, match=f"There is no .*a.csv. `lightning-bd {command[make]}.*` writes it"):
        make(table)
    with pytest.raises(ValueError, match=r"a\.csv has no row yet"):
        make(write(table, columns, []))
    table.write_text("")
    with pytest.raises(ValueError, match=f"lacks the column `{columns[0]}`, .*; it has none"):
        make(table)
    with pytest.raises(ValueError, match=rf"lacks the column `{columns[1]}`; it has {columns[0]}, {columns[2]}"):
        make(write(table, [*columns[:1], *columns[2:]], [[0] * (len(columns) - 1)]))
    broken = ["0.5"] * len(columns)
    broken[1] = "many"
    with pytest.raises(ValueError, match=f"a.csv, line 3: expected `{columns[1]}` to be a number, but got 'many'"):
        make(write(table, columns, [["0.5"] * len(columns), broken]))


def test_coordinates_are_finite_and_make_a_grid(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    with pytest.raises(ValueError, match="line 2: expected `position` to be a finite number, but got ''"):
        interpolation_figure(write(table, LINE, [("", 1, 1, 1, 1)]))
    with pytest.raises(ValueError, match="line 2: expected `beta` to be a finite number, but got 'inf'"):
        landscape_figure(write(table, PLANE, [(0, "inf", 1, 1, 1, 1)]))
    with pytest.raises(ValueError, match=r"a.csv has 1 x 2 points, but contours take at least 2 x 2"):
        landscape_figure(write(table, PLANE, [(0, beta, 1, 1, 1, 1) for beta in (0, 1)]))


def test_rows_that_are_cut_short_are_empty_cells(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", LINE, [(0, 1, 0.9), (1, 1, 0.9)])
    assert [list(curves(axes)) for axes in interpolation_figure(table).axes] == [["clean images"], ["clean accuracy"]]


def test_tensorboard_takes_a_figure(tmp_path: Path) -> None:
    figure = sharpness_figure(write(tmp_path / "a.csv", SHARP, [CLEAN, POISONED]))
    with SummaryWriter(str(tmp_path / "events")) as writer:
        writer.add_figure("sharpness", figure)
    assert next((tmp_path / "events").iterdir()).stat().st_size > 5000
