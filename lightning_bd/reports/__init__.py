"""Files in, tables and figures out; never imported by training."""

from lightning_bd.reports.figures import plot_learning_rates, plot_results

__all__ = ("plot_learning_rates", "plot_results")
