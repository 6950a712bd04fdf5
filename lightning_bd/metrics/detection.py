"""Measures of a detector's scores over all batches and processes."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_bd.functional.detection import (
    average_precision,
    check_fpr,
    check_positive,
    check_scores,
    check_tpr,
    detection_metrics,
    fpr_at_tpr,
    rank_auroc,
    tpr_at_fpr,
)

__all__ = (
    "DetectionAUROC",
    "DetectionAveragePrecision",
    "DetectionMetrics",
    "FalsePositiveRate",
    "TruePositiveRate",
)


class _DetectionMetric(Metric):
    """Keeps every score: no measure by ranks can be had from less.

    All subclasses hold the same states after the same updates, so that a ``MetricCollection``, which gives each of its
    metrics the same updates, rightly keeps them once.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    scores: list[Tensor]
    positives: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("positives", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, positives: Tensor) -> None:
        """Keep a batch of scores; it may hold images of one kind only, or none.

        Args:
            scores: Score of each image, ``(B,)``, floating point, higher is more suspicious; any range.
            positives: Whether each image is out of distribution or poisoned, ``(B,)``, bool.

        Raises:
            ValueError: If the shapes or the kinds of numbers differ from the above.
        """
        check_scores(scores, positives)
        # For a process without images torchmetrics gathers an empty tensor of the metric's own dtype, and processes
        # that gather different dtypes read each other's bytes wrongly. Widening changes no order.
        self.scores.append(scores.detach().to(torch.promote_types(scores.dtype, self.dtype)))
        self.positives.append(positives.to(self.dtype))

    def _all(self) -> tuple[Tensor, Tensor]:
        """Every score and mark; empty, for the function to refuse, where there was no update."""
        if len(self.scores) == 0:
            return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        return dim_zero_cat(self.scores), dim_zero_cat(self.positives).bool()


class DetectionAUROC(_DetectionMetric):
    """Probability that a suspicious image scores higher than an inconspicuous one, a tie counted as one half.

    Scores and marks of all images are kept, joined over batches and over processes. Call ``update`` on batches:
    ``forward`` computes on the batch alone too, which fails where it holds images of one kind only. float64 scores on
    several processes, one of which may have no images, need ``set_dtype(torch.float64)``. Pure form, and what
    distinguishes it from torchmetrics' ``BinaryAUROC``: `lightning_bd.functional.detection.rank_auroc`.

    Example:
        >>> from torch import tensor
        >>> metric = DetectionAUROC()
        >>> metric.update(tensor([100.0, 300.0]), positives=tensor([False, False]))
        >>> metric.update(tensor([200.0, 400.0]), positives=tensor([True, True]))
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Rank all images; ValueError where a score is NaN or they are not of both kinds."""
        return rank_auroc(*self._all())


class DetectionAveragePrecision(_DetectionMetric):
    """Area under the precision-recall curve, of the suspicious images or of the inconspicuous ones.

    State, ``forward`` and float64 scores as for `DetectionAUROC`. Pure form:
    `lightning_bd.functional.detection.average_precision`.

    Args:
        positive: ``"out"`` counts the suspicious images as the positives (AUPR-out), ``"in"`` the inconspicuous ones,
            by the negated scores (AUPR-in).

    Raises:
        ValueError: If ``positive`` is neither ``"out"`` nor ``"in"``.

    Example:
        >>> from torch import tensor
        >>> metric = DetectionAveragePrecision()
        >>> metric.update(tensor([0.1, 0.4, 0.3, 0.8]), positives=tensor([False, False, True, True]))
        >>> metric.compute()
        tensor(0.8333)
    """

    higher_is_better = True

    def __init__(self, positive: Literal["out", "in"] = "out") -> None:
        check_positive(positive)
        super().__init__()
        self.positive: Literal["out", "in"] = positive

    def compute(self) -> Tensor:
        """Rank all images; ValueError where a score is NaN or they are not of both kinds."""
        return average_precision(*self._all(), positive=self.positive)


class FalsePositiveRate(_DetectionMetric):
    """Smallest share of false positives at a threshold that finds at least ``tpr`` of the positives.

    The two conventions that go by the name FPR95 are told apart, by an example, in the pure form:
    `lightning_bd.functional.detection.fpr_at_tpr`. State, ``forward`` and float64 scores as for `DetectionAUROC`.

    Args:
        tpr: Share of the positives to find at least, in (0, 1]; 0.95 is usual.
        positive: ``"out"``: the suspicious images are to be found, the inconspicuous ones flagged wrongly are counted.
            ``"in"``: the inconspicuous images are to be accepted, the suspicious ones accepted wrongly are counted.

    Raises:
        ValueError: If ``tpr`` is outside (0, 1] or ``positive`` is neither ``"out"`` nor ``"in"``.

    Example:
        >>> from torch import tensor
        >>> metric = FalsePositiveRate(positive="in")
        >>> metric.update(tensor([0.1, 0.2, 0.3, 0.9]), positives=tensor([False, False, False, False]))
        >>> metric.update(tensor([0.5, 0.6, 0.7, 0.8]), positives=tensor([True, True, True, True]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False

    def __init__(self, tpr: float = 0.95, positive: Literal["out", "in"] = "out") -> None:
        check_tpr(tpr)
        check_positive(positive)
        super().__init__()
        self.tpr = tpr
        self.positive: Literal["out", "in"] = positive

    def compute(self) -> Tensor:
        """Rank all images; ValueError where a score is NaN or they are not of both kinds."""
        return fpr_at_tpr(*self._all(), tpr=self.tpr, positive=self.positive)


class TruePositiveRate(_DetectionMetric):
    """Largest share of the suspicious images found at a threshold that flags at most ``fpr`` of the others.

    State, ``forward`` and float64 scores as for `DetectionAUROC`. Pure form:
    `lightning_bd.functional.detection.tpr_at_fpr`.

    Args:
        fpr: Share of the inconspicuous images that may be flagged, in [0, 1).

    Raises:
        ValueError: If ``fpr`` is outside [0, 1).

    Example:
        >>> from torch import tensor
        >>> metric = TruePositiveRate(fpr=0.01)
        >>> metric.update(tensor([0.1, 0.2, 0.6]), positives=tensor([False, False, False]))
        >>> metric.update(tensor([0.5, 0.7, 0.8]), positives=tensor([True, True, True]))
        >>> metric.compute()
        tensor(0.6667)
    """

    higher_is_better = True

    def __init__(self, fpr: float = 0.01) -> None:
        check_fpr(fpr)
        super().__init__()
        self.fpr = fpr

    def compute(self) -> Tensor:
        """Rank all images; ValueError where a score is NaN or they are not of both kinds."""
        return tpr_at_fpr(*self._all(), fpr=self.fpr)


class DetectionMetrics(_DetectionMetric):
    """Every measure of a detector at the usual levels, from one state.

    State, ``forward`` and float64 scores as for `DetectionAUROC`. Pure form, which names the measures:
    `lightning_bd.functional.detection.detection_metrics`.

    Example:
        >>> from torch import tensor
        >>> metric = DetectionMetrics()
        >>> metric.update(tensor([0.1, 0.2, 0.3, 0.9]), positives=tensor([False, False, False, False]))
        >>> metric.update(tensor([0.5, 0.6, 0.7, 0.8]), positives=tensor([True, True, True, True]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'auroc': 0.75, 'aupr_out': 0.679, 'aupr_in': 0.875, 'fpr95_out': 0.25, 'fpr95_in': 1.0, 'tpr_at_fpr1': 0.0}
    """

    def compute(self) -> dict[str, Tensor]:
        """Rank all images; ValueError where a score is NaN or they are not of both kinds."""
        return detection_metrics(*self._all())
