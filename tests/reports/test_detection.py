"""Figures of detectors: what is drawn, read back from matplotlib's own objects and from the written files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_curve

from lightning_bd.reports.detection import detection_figures, roc_curve, suspicious_grid

SETS = {"id": (400, False, 0.0), "near": (150, True, 1.0), "far$": (90, True, 3.0)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Return the figures by the names of their files, which are not written."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, target: figures.update({target.name: self}))
    return figures


def columns() -> dict[str, NDArray[np.generic]]:
    """Scores of three detectors; one did not look at the last set."""
    generator = np.random.default_rng(0)
    count = sum(number for number, _, _ in SETS.values())
    names = np.concatenate([[name] * number for name, (number, _, _) in SETS.items()])
    scores = np.concatenate([generator.normal(mean, 1, number) for number, _, mean in SETS.values()])
    return {
        "index": np.arange(count),
        "set": names,
        "label": np.zeros(count, dtype=np.int64),
        "prediction": np.zeros(count, dtype=np.int64),
        "positive": np.concatenate([[positive] * number for number, positive, _ in SETS.values()]),
        "Energy": scores,
        "Rounded": np.round(scores).astype(np.float32),
        "a/b": np.where(names == "far$", np.nan, -scores),
    }


def write(path: Path, table: dict[str, NDArray[np.generic]]) -> Path:
    pq.write_table(pa.table(table), path)
    return path


def legend_texts(owner: Axes | Figure) -> list[str]:
    legend = owner.get_legend() if isinstance(owner, Axes) else owner.legends[0]
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def densities(figure: Figure) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return heights and edges of the outlined histograms."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, StepPatch) and not patch.get_fill()]
    return [(np.asarray(values), np.asarray(edges)) for values, edges, _ in (patch.get_data() for patch in patches)]


def test_the_files_that_are_written(tmp_path: Path) -> None:
    found = detection_figures(write(tmp_path / "scores.parquet", columns()), tmp_path / "new" / "figures")
    names = ["histogram_Energy.png", "histogram_Rounded.png", "histogram_a_b.png", "roc.png"]
    assert [path.name for path in found] == names
    assert sorted(path.name for path in (tmp_path / "new" / "figures").iterdir()) == names
    for path in found:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[1] > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_histograms_are_densities_over_shared_bins(drawn: dict[str, Figure], tmp_path: Path) -> None:
    table = columns()
    detection_figures(write(tmp_path / "scores.parquet", table), tmp_path)
    figure = drawn["histogram_Energy.png"]
    assert legend_texts(figure) == ["id (n = 400)", "near (n = 150)", "far$ (n = 90)"]
    scores = np.asarray(table["Energy"], dtype=np.float64)
    parts = [scores[table["set"] == name] for name in SETS]
    low = min(np.percentile(part, 0.5) for part in parts)
    high = max(np.percentile(part, 99.5) for part in parts)
    shown = densities(figure)
    assert len(shown) == 3
    for part, (heights, edges) in zip(parts, shown, strict=True):
        np.testing.assert_allclose((edges[0], edges[-1]), (low, high))
        inside = float(((part >= edges[0]) & (part <= edges[-1])).mean())
        assert np.sum(heights * np.diff(edges)) == pytest.approx(inside)
        assert inside > 0.97
        place = len(heights) // 2
        count = int(((part >= edges[place]) & (part < edges[place + 1])).sum())
        assert heights[place] == pytest.approx(count / len(part) / (edges[1] - edges[0]))
    assert figure.axes[0].get_xscale() == "linear"
    assert legend_texts(drawn["histogram_a_b.png"]) == ["id (n = 400)", "near (n = 150)"]
    colors = [[patch.get_edgecolor() for patch in drawn[f"histogram_{name}.png"].axes[0].patches] for name in
              ("Energy", "a_b")]  # fmt: skip
    assert colors[1] == colors[0][: len(colors[1])]


def test_wide_positive_scores_have_a_logarithmic_axis(drawn: dict[str, Figure], tmp_path: Path) -> None:
    table = columns()
    scores = np.asarray(table["Energy"], dtype=np.float64)
    detection_figures(write(tmp_path / "scores.parquet", {**table, "Energy": 10**scores}), tmp_path)
    figure = drawn["histogram_Energy.png"]
    assert figure.axes[0].get_xscale() == "log"
    assert figure.axes[0].get_ylabel() == "density per factor of ten"
    for heights, edges in densities(figure):
        assert 0.97 < np.sum(heights * np.diff(np.log10(edges))) < 1 + 1e-9


def test_one_value_and_infinite_ones_are_drawn(drawn: dict[str, Figure], tmp_path: Path) -> None:
    table = columns()
    count = len(table["set"])
    infinite = np.where(table["positive"], np.inf, -np.inf)
    detection_figures(
        write(tmp_path / "scores.parquet", {**table, "Energy": np.full(count, 5.0), "Rounded": infinite}), tmp_path
    )
    [one, *_] = densities(drawn["histogram_Energy.png"])
    assert np.sum(one[0] * np.diff(one[1])) == pytest.approx(1)
    texts = legend_texts(drawn["roc.png"].axes[0])
    assert texts[0] == "Rounded: 1.000"  # the best first
    assert "Energy: 0.500" in texts


def test_roc_panels_have_a_line_per_detector(drawn: dict[str, Figure], tmp_path: Path) -> None:
    table = columns()
    detection_figures(write(tmp_path / "scores.parquet", table), tmp_path)
    panels = drawn["roc.png"].axes
    assert [axes.get_title() for axes in panels] == ["near", "far$", "", ""]
    assert [axes.get_xscale() for axes in panels] == ["linear", "linear", "log", "log"]
    assert panels[2].get_xlim() == (1e-3, 1)
    expected: dict[str, list[str]] = {}
    for name in ("near", "far$"):
        rows = (table["set"] == "id") | (table["set"] == name)
        for detector in ("Energy", "Rounded", "a/b"):
            if (name, detector) != ("far$", "a/b"):
                area = roc_auc_score(table["positive"][rows], table[detector][rows])
                expected.setdefault(name, []).append(f"{detector}: {area:.3f}")
    for axes, name in zip(panels, expected, strict=False):
        texts = legend_texts(axes)
        assert sorted(texts) == sorted(expected[name])
        areas = [float(text.split(": ")[1]) for text in texts]
        assert areas == sorted(areas, reverse=True)
    # Lines of the detectors, then the one of chance.
    assert [len(axes.get_lines()) for axes in panels] == [4, 3, 4, 3]
    rows = (table["set"] == "id") | (table["set"] == "near")
    alarms, hits, _ = sklearn_curve(table["positive"][rows], table["Rounded"][rows], drop_intermediate=False)
    line = panels[0].get_lines()[1]
    np.testing.assert_allclose(np.asarray(line.get_xdata(), dtype=float), alarms)
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), hits)
    places, heights = (np.asarray(data, dtype=float) for data in panels[2].get_lines()[1].get_data())
    np.testing.assert_allclose(heights, np.interp(places, alarms, hits))
    assert places[0] == 1e-3


def test_a_set_of_both_kinds_is_compared_with_itself(drawn: dict[str, Figure], tmp_path: Path) -> None:
    table = columns()
    table["positive"][:100] = True
    table["positive"][400:450] = False
    detection_figures(write(tmp_path / "scores.parquet", table), tmp_path)
    assert [axes.get_title() for axes in drawn["roc.png"].axes[:3]] == ["id, positive", "near, positive", "far$"]
    area = roc_auc_score(table["positive"][:400], table["Energy"][:400])
    assert legend_texts(drawn["roc.png"].axes[0])[0] == f"Energy: {area:.3f}"
    assert legend_texts(drawn["histogram_Energy.png"])[:2] == ["id (n = 300)", "id, positive (n = 100)"]


def test_without_images_to_find_there_is_no_roc(drawn: dict[str, Figure], tmp_path: Path) -> None:
    table = {**columns(), "a/b": np.full(640, np.nan)}
    table["positive"] = np.zeros(640, dtype=bool)
    found = detection_figures(write(tmp_path / "scores.parquet", table), tmp_path)
    assert [path.name for path in found] == ["histogram_Energy.png", "histogram_Rounded.png"]


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_area_is_that_of_scikit_learn(levels: int) -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        positives = generator.random(50) < 0.3
        scores = generator.integers(0, levels, 50) + 0.5 * positives
        alarms, hits, area = roc_curve(scores, positives)
        expected = sklearn_curve(positives, scores, drop_intermediate=False)
        np.testing.assert_allclose(alarms, expected[0])
        np.testing.assert_allclose(hits, expected[1])
        assert area == pytest.approx(float(roc_auc_score(positives, scores)))


def test_refuses_tables(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with pytest.raises(ValueError, match=r"There is no .*scores\.parquet\. Pass a table of scores"):
        detection_figures(path, tmp_path)
    path.write_bytes(b"index,set\n1,id\n")
    with pytest.raises(ValueError, match=r"scores\.parquet is not a readable parquet table"):
        detection_figures(path, tmp_path)
    table = columns()
    lacking = {name: values for name, values in table.items() if name not in ("set", "label")}
    with pytest.raises(
        ValueError, match=r"lacks the column `set`, `label`; it has index, prediction, positive, Energy"
    ):
        detection_figures(write(path, lacking), tmp_path)
    with pytest.raises(ValueError, match=r"scores\.parquet has no row: no image was scored"):
        detection_figures(write(path, {name: values[:0] for name, values in table.items()}), tmp_path)
    facts = {name: table[name] for name in ("index", "set", "label", "prediction", "positive")}
    with pytest.raises(ValueError, match=r"scores\.parquet has no column of a detector's scores"):
        detection_figures(write(path, facts), tmp_path)
    with pytest.raises(ValueError, match="has rows without a `set`, or whose `positive` is neither true nor false"):
        detection_figures(write(path, {**table, "positive": np.ones(640)}), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_every_image_under_its_caption(channels: int, drawn: dict[str, Figure], tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((11, channels, 5, 4), dtype=np.float32)
    captions = [f"$ {number}\ncat" for number in range(11)]
    suspicious_grid(images, captions, tmp_path / "grid.png", "Most suspicious")
    panels = drawn["grid.png"].axes
    assert len(panels) == 16
    for axes, image, caption in zip(panels, images, captions, strict=False):
        assert axes.get_title() == caption
        shown = np.asarray(axes.get_images()[0].get_array())
        np.testing.assert_allclose(shown.reshape(5, 4, channels), image.transpose(1, 2, 0))
        assert axes.get_images()[0].get_clim() == (0, 1)
    assert not any(axes.get_images() for axes in panels[11:])


def test_the_grid_is_a_file(tmp_path: Path) -> None:
    suspicious_grid(np.full((1, 3, 4, 4), 0.5), ["$"], tmp_path / "grid.png", "a $ b")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert (abs(pixels.astype(int) - 127.5) < 1).all(axis=2).mean() > 0.1


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 2, 4, 4), (3, 4, 4)])
def test_the_grid_refuses_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`images` to be \(N, 1 or 3, H, W\) with N > 0, but got \("):
        suspicious_grid(np.zeros(shape), ["a"] * shape[0], tmp_path / "grid.png")


def test_the_grid_needs_a_caption_per_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one caption for each of 2 images, but got 1"):
        suspicious_grid(np.zeros((2, 3, 4, 4)), ["a"], tmp_path / "grid.png")
