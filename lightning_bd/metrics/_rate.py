"""Counts that the rates of triggered images share."""

from torch import Tensor, tensor
from torchmetrics import Metric

__all__ = ("Rate",)


class Rate(Metric):
    """Keep successes and images as sums over batches and processes, and divide them at the end."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    successes: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("successes", default=tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Divide the successes by the images; NaN where no image counted."""
        return self.successes / self.total

    def _add(self, successes: Tensor, total: Tensor) -> None:
        self.successes = self.successes + successes
        self.total = self.total + total
