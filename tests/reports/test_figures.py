"""Figures: what is drawn, read back from matplotlib's own objects and from the written file."""

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lightning_bd.reports import plot_learning_rates, plot_results
from lightning_bd.reports.__main__ import main

COLUMNS = ["phase", "start_from", "clean_accuracy", "attack_success_rate", "robust_accuracy"]
ROWS = [["inject", "init", "0.98", "1.0", "0.0"], ["defend-ft", "inject", "0.95", "", ""]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written, as objects."""
    figures: list[Figure] = []
    write = Figure.savefig

    def keep(self: Figure, target: Path) -> None:
        figures.append(self)
        write(self, target)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def heights(axes: Axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]


def test_results_are_bars_in_percent_and_the_unknown_is_left_out(drawn: list[Figure], tmp_path: Path) -> None:
    plot_results(write_csv(tmp_path / "results.csv", COLUMNS, ROWS), tmp_path / "figure.png", "A run")
    axes = drawn[0].axes[0]
    assert heights(axes) == pytest.approx([98.0, 95.0, 100.0, 0.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["inject\nfrom init", "defend-ft\nfrom inject"]
    assert axes.get_ylabel() == "test images (%)"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "clean accuracy", "attack success rate", "robust accuracy",
    ]  # fmt: skip
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert pixels.shape[1] > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_learning_rates_are_means_over_seeds(drawn: list[Figure], tmp_path: Path) -> None:
    columns = ["model", "learning_rate", "seed", "clean_accuracy", "attack_success_rate"]
    table = "a,0.1,1,0.9,0.2 a,0.1,2,0.8,0.6 a,0.01,1,1.0,1.0 a,0.01,2,1.0,1.0 b,0.1,1,0.5,0.5 b,0.01,1,0.5,0.25"
    rows = [row.split(",") for row in table.split()]
    plot_learning_rates(write_csv(tmp_path / "study.csv", columns, rows), tmp_path / "study.png", "Study")
    attack, clean = drawn[0].axes
    lines = {name: attack.get_lines()[place].get_ydata() for name, place in (("a", 0), ("b", 3))}
    np.testing.assert_allclose(np.asarray(lines["a"], dtype=float), [100.0, 40.0])
    np.testing.assert_allclose(np.asarray(lines["b"], dtype=float), [25.0, 50.0])
    np.testing.assert_allclose(np.asarray(clean.get_lines()[0].get_ydata(), dtype=float), [100.0, 85.0])
    assert [label.get_text() for label in attack.get_xticklabels()] == ["0.01", "0.1"]
    assert (tmp_path / "study.png").is_file()


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no .*results\.csv\. A run writes"):
        plot_results(tmp_path / "results.csv", tmp_path / "figure.png")
    with pytest.raises(ValueError, match="has no row yet: no phase has finished"):
        plot_results(write_csv(tmp_path / "results.csv", COLUMNS, []), tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "results.csv", COLUMNS, ROWS)
    main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "nowhere")])
    assert "error: There is no" in capsys.readouterr().err
