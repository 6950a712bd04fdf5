"""Files in, tables and figures out; never imported by training."""

from lightning_bd.reports.detection import detection_figures, suspicious_grid
from lightning_bd.reports.figures import plot_learning_rates, plot_results, plot_stages
from lightning_bd.reports.interpolation import interpolation_figure
from lightning_bd.reports.landscape import landscape_figure
from lightning_bd.reports.sharpness import sharpness_figure

__all__ = (
    "detection_figures",
    "interpolation_figure",
    "landscape_figure",
    "plot_learning_rates",
    "plot_results",
    "plot_stages",
    "sharpness_figure",
    "suspicious_grid",
)
