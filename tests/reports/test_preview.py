"""The figure of a trigger, read back from matplotlib's own objects."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lightning_bd.reports.preview import amplification, preview_figure


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_are_clean_triggered_and_residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, target: Path, format: str) -> None:
        drawn.append(self)
        save(self, target, format=format)

    monkeypatch.setattr(Figure, "savefig", keep)
    clean = np.full((2, channels, 6, 6), 0.5)
    triggered = clean.copy()
    triggered[:, :, 0, 0], triggered[:, :, 5, 5] = 0.55, 0.4
    factor = preview_figure(clean, triggered, ["cat to dog", "$x"], tmp_path / "new" / "figure.png", "a $title$")
    assert factor == pytest.approx(amplification(triggered - clean))
    assert 4.9 < factor < 5.1
    with Image.open(tmp_path / "new" / "figure.png") as image:
        assert image.format == "PNG"
    pictures = [axes.images[0].get_array() for axes in drawn[0].axes]
    assert len(pictures) == 6
    for column in (0, 1):
        shown = [np.asarray(pictures[row * 2 + column]).reshape(6, 6, -1) for row in range(3)]
        np.testing.assert_allclose(shown[0], clean[column].transpose(1, 2, 0))
        np.testing.assert_allclose(shown[1], triggered[column].transpose(1, 2, 0))
        np.testing.assert_allclose(shown[2][0, 0], 0.5 + factor * 0.05)
        np.testing.assert_allclose(shown[2][5, 5], max(0.0, 0.5 - factor * 0.1))
        assert (shown[2][1:5, 1:5] == 0.5).all()
    assert [drawn[0].axes[column].get_title() for column in (0, 1)] == ["cat to dog", "$x"]
    assert drawn[0].axes[4].get_ylabel() == f"residual x {factor:.3g}"


def test_large_differences_are_not_made_smaller() -> None:
    assert amplification(np.array([0.0, 1.0, -1.0])) == 1
    assert amplification(np.zeros(4)) == 1
    assert amplification(np.array([0.0, -0.01])) == pytest.approx(50)


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"`clean` to be \(N, 1 or 3, H, W\) with N > 0, but got \(0, 3, 4, 4\)"):
        preview_figure(images[:0], images[:0], [], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"`clean` to be .* but got \(2, 2, 4, 4\)"):
        preview_figure(images[:, :2], images[:, :2], ["a", "b"], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"`triggered` to be \(2, 3, 4, 4\) like `clean`, but got \(1, 3, 4, 4\)"):
        preview_figure(images, images[:1], ["a", "b"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="one caption for each of 2 images, but got 1"):
        preview_figure(images, images, ["a"], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
