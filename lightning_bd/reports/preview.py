"""What a trigger does to images: clean, triggered, and the difference amplified."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_bd.reports.panels import Values, canvas_of

__all__ = ("amplification", "preview_figure")


def preview_figure(
    clean: ArrayLike, triggered: ArrayLike, captions: Sequence[str], path: Path, title: str = ""
) -> float:
    """Draw clean images, below each its triggered version, and below that the difference, amplified around grey.

    Args:
        clean: ``(N, C, H, W)`` in [0, 1], C being 1 or 3; an array, or a tensor on the CPU.
        triggered: The same images with the trigger.
        captions: One per image, of a few words.
        path: The PNG file to write; its folder is made.
        title: Above the figure.

    Returns:
        The factor by which differences are amplified.

    Raises:
        ValueError: If there is no image, shapes do not fit, or there are not as many captions.
    """
    before: Values = np.asarray(clean, dtype=np.float64)
    after: Values = np.asarray(triggered, dtype=np.float64)
    if before.ndim != 4 or before.shape[1] not in (1, 3) or not len(before):
        raise ValueError(f"Expected argument `clean` to be (N, 1 or 3, H, W) with N > 0, but got {before.shape}.")
    if after.shape != before.shape:
        raise ValueError(f"Expected argument `triggered` to be {before.shape} like `clean`, but got {after.shape}.")
    if len(captions) != len(before):
        raise ValueError(f"Expected one caption for each of {len(before)} images, but got {len(captions)}.")
    residual = after - before
    factor = amplification(residual)
    names = ("clean", "triggered", f"residual x {factor:.3g}")
    height = before.shape[2] / before.shape[3]
    lines = title.count("\n") + 1 if title else 0
    canvas = canvas_of(max(1.25 * len(before) + 0.4, 4.6), 3 * 1.25 * height + 0.3 + 0.2 * lines, title)
    panels = canvas.subplots(3, len(before), squeeze=False)
    for row, pictures in enumerate((before, after, 0.5 + factor * residual)):
        for axes, image in zip(panels[row], pictures, strict=True):
            shown = np.clip(image, 0, 1).transpose(1, 2, 0)
            axes.imshow(shown[..., 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1, aspect="equal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        panels[row, 0].set_ylabel(names[row], fontsize=8)
    for axes, caption in zip(panels[0], captions, strict=True):
        axes.set_title(caption, fontsize=7, pad=3, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, format="png")
    return factor


def amplification(residual: NDArray[np.float64]) -> float:
    """Return the factor that lets 99 % of the differences fill half of the range; at least 1.

    Args:
        residual: Differences in [-1, 1]; those that are zero do not count.

    Example:
        >>> amplification(np.array([0.0, 0.0, 0.05, -0.05]))
        10.0
        >>> amplification(np.zeros(3)), amplification(np.ones(3))
        (1.0, 1.0)
    """
    sizes = np.abs(residual)
    sizes = sizes[sizes > 0]
    return max(1.0, 0.5 / float(np.percentile(sizes, 99))) if len(sizes) else 1.0
