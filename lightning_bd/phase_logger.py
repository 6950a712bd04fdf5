"""TensorBoard over several phases."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ("PhaseTensorBoardLogger",)


class PhaseTensorBoardLogger(TensorBoardLogger):
    """Writes a phase's events into its own folder, on a step axis that goes on where the phase before ended.

    Args:
        folder: The phase's folder; events go to ``tensorboard`` in it.
        first_step: Steps that the phases before have taken.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(folder, name="tensorboard", version="")
        self.first_step = first_step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at the run's step."""
        super().log_metrics(metrics, self.first_step + (step or 0))
