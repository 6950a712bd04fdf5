"""Files in, tables and figures out; never imported by training."""

from lightning_bd.reports.figures import plot_learning_rates, plot_results, plot_stages
from lightning_bd.reports.surfaces import (
    interpolation_figure,
    landscape_figure,
    plot_interpolation,
    plot_landscape,
    plot_sharpness,
    sharpness_figure,
)

__all__ = (
    "interpolation_figure",
    "landscape_figure",
    "plot_interpolation",
    "plot_landscape",
    "plot_learning_rates",
    "plot_results",
    "plot_sharpness",
    "plot_stages",
    "sharpness_figure",
)
