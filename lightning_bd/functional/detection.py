"""Measures of a detector's scores: exact, by ranks, ties included."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ("average_precision", "detection_metrics", "fpr_at_tpr", "rank_auroc", "tpr_at_fpr")


def rank_auroc(scores: Tensor, positives: Tensor) -> Tensor:
    """Probability that a suspicious image scores higher than an inconspicuous one, a tie counted as one half.

    The area under the ROC curve. It depends on the order of the scores alone: nothing squeezes them into [0, 1] first,
    as torchmetrics' ``BinaryAUROC`` does by a sigmoid, which makes all large scores equal. Infinite scores are
    ordinary ones. Computed from integer counts, exact until the rounding of the result.

    Args:
        scores: Score of each image, ``(N,)``, floating point, higher is more suspicious; infinities are allowed.
        positives: Whether each image is out of distribution or poisoned, ``(N,)``, bool.

    Returns:
        The area in [0, 1], a tensor without dimensions of the default dtype on the device of ``scores``; 0.5 where
        all scores are equal.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above, a score is NaN, or the images are not
            of both kinds.

    Example:
        >>> scores = torch.tensor([100.0, 300.0, 200.0, 400.0])
        >>> rank_auroc(scores, torch.tensor([False, False, True, True]))
        tensor(0.7500)
    """
    true, false = _counts(scores, positives, "out")
    # Trapezes: each false positive of a group of ties pairs with the true ones above it and half of those beside it.
    # Twice the area stays an integer, and Python divides integers of any size with one rounding.
    doubled = int((_steps(false) * (2 * true - _steps(true))).sum())
    return scores.new_tensor(doubled / (2 * int(true[-1]) * int(false[-1])), dtype=torch.get_default_dtype())


def average_precision(scores: Tensor, positives: Tensor, positive: Literal["out", "in"] = "out") -> Tensor:
    """Precision at each threshold, weighted by the gain in recall there: the area under the precision-recall curve.

    ``sum_t (recall_t - recall_{t-1}) * precision_t`` over the distinct scores, without interpolation, as scikit-learn's
    ``average_precision_score``. Unlike the area under the ROC curve it depends on the share of suspicious images: a
    detector without skill reaches the share of the positives.

    Args:
        scores: Score of each image, ``(N,)``, floating point, higher is more suspicious; infinities are allowed.
        positives: Whether each image is out of distribution or poisoned, ``(N,)``, bool.
        positive: ``"out"`` counts the suspicious images as the positives (AUPR-out), ``"in"`` the inconspicuous ones,
            by the negated scores (AUPR-in).

    Returns:
        The area in (0, 1], a tensor without dimensions of the default dtype on the device of ``scores``.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above, a score is NaN, the images are not of
            both kinds, or ``positive`` is neither ``"out"`` nor ``"in"``.

    Example:
        >>> scores, positives = torch.tensor([0.1, 0.4, 0.3, 0.8]), torch.tensor([False, False, True, True])
        >>> average_precision(scores, positives), average_precision(scores, positives, positive="in")
        (tensor(0.8333), tensor(0.8333))
    """
    true, false = _counts(scores, positives, positive)
    gains = _steps(true).double() / true[-1].double()
    area = float((gains * (true.double() / (true + false).double())).sum())
    # The gains add up to one but for rounding.
    return scores.new_tensor(min(area, 1.0), dtype=torch.get_default_dtype())


def fpr_at_tpr(scores: Tensor, positives: Tensor, tpr: float = 0.95, positive: Literal["out", "in"] = "out") -> Tensor:
    """Smallest share of false positives at a threshold that finds at least ``tpr`` of the positives.

    Two conventions are in use under the one name FPR95, and they are different numbers:

    - ``"out"``: the threshold finds 95 % of the suspicious images; the rate is the share of inconspicuous images that
      it flags wrongly.
    - ``"in"``: the threshold accepts 95 % of the inconspicuous images; the rate is the share of suspicious images that
      it accepts wrongly.

    The example's inconspicuous images score 0.1, 0.2, 0.3 and 0.9, its suspicious ones 0.5, 0.6, 0.7 and 0.8; 95 % of
    four images are all four. Flagging from 0.5 up finds every suspicious image and flags one of the four inconspicuous
    ones: 0.25 by ``"out"``. Accepting every inconspicuous image takes accepting up to 0.9, which accepts all suspicious
    ones: 1.0 by ``"in"``.

    Only thresholds that occur count, nothing is interpolated: the first point of scikit-learn's
    ``roc_curve(drop_intermediate=False)`` that reaches ``tpr``. Images of equal score are flagged together.

    Args:
        scores: Score of each image, ``(N,)``, floating point, higher is more suspicious; infinities are allowed.
        positives: Whether each image is out of distribution or poisoned, ``(N,)``, bool.
        tpr: Share of the positives to find at least, in (0, 1]; 0.95 is usual.
        positive: Which images are the positives, see above.

    Returns:
        The rate in [0, 1], a tensor without dimensions of the default dtype on the device of ``scores``.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above, a score is NaN, the images are not of
            both kinds, ``tpr`` is outside (0, 1], or ``positive`` is neither ``"out"`` nor ``"in"``.

    Example:
        >>> scores = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.5, 0.6, 0.7, 0.8])
        >>> positives = torch.tensor([False] * 4 + [True] * 4)
        >>> fpr_at_tpr(scores, positives), fpr_at_tpr(scores, positives, positive="in")
        (tensor(0.2500), tensor(1.))
    """
    check_tpr(tpr)
    true, false = _counts(scores, positives, positive)
    # Both counts rise with each threshold: the first that reaches the rate costs the fewest false positives.
    found = true.double() / true[-1].double() >= tpr
    first = int((~found).sum())
    return scores.new_tensor(int(false[first]) / int(false[-1]), dtype=torch.get_default_dtype())


def tpr_at_fpr(scores: Tensor, positives: Tensor, fpr: float = 0.01) -> Tensor:
    """Largest share of the suspicious images found at a threshold that flags at most ``fpr`` of the others.

    Only thresholds that occur count, nothing is interpolated; flagging nothing is one of them, so that 0 is the answer
    where the highest score already flags too many. With ``M`` inconspicuous images, rates below ``1 / M`` allow none.

    Args:
        scores: Score of each image, ``(N,)``, floating point, higher is more suspicious; infinities are allowed.
        positives: Whether each image is out of distribution or poisoned, ``(N,)``, bool.
        fpr: Share of the inconspicuous images that may be flagged, in [0, 1).

    Returns:
        The rate in [0, 1], a tensor without dimensions of the default dtype on the device of ``scores``.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above, a score is NaN, the images are not of
            both kinds, or ``fpr`` is outside [0, 1).

    Example:
        >>> scores = torch.tensor([0.1, 0.2, 0.6, 0.5, 0.7, 0.8])
        >>> tpr_at_fpr(scores, torch.tensor([False, False, False, True, True, True]))
        tensor(0.6667)
    """
    check_fpr(fpr)
    true, false = _counts(scores, positives, "out")
    allowed = int((false.double() / false[-1].double() <= fpr).sum())
    found = int(true[allowed - 1]) if allowed else 0
    return scores.new_tensor(found / int(true[-1]), dtype=torch.get_default_dtype())


def detection_metrics(scores: Tensor, positives: Tensor) -> dict[str, Tensor]:
    """Judge a detector by every measure of this module, at the levels that are usual.

    Args:
        scores: Score of each image, ``(N,)``, floating point, higher is more suspicious; infinities are allowed.
        positives: Whether each image is out of distribution or poisoned, ``(N,)``, bool.

    Returns:
        Tensors without dimensions: ``auroc`` (`rank_auroc`), ``aupr_out`` and ``aupr_in`` (`average_precision`),
        ``fpr95_out`` and ``fpr95_in`` (`fpr_at_tpr` at 0.95) and ``tpr_at_fpr1`` (`tpr_at_fpr` at 0.01).

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above, a score is NaN, or the images are not
            of both kinds.

    Example:
        >>> scores = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.5, 0.6, 0.7, 0.8])
        >>> values = detection_metrics(scores, torch.tensor([False] * 4 + [True] * 4))
        >>> {name: round(value.item(), 3) for name, value in values.items()}
        {'auroc': 0.75, 'aupr_out': 0.679, 'aupr_in': 0.875, 'fpr95_out': 0.25, 'fpr95_in': 1.0, 'tpr_at_fpr1': 0.0}
    """
    return {
        "auroc": rank_auroc(scores, positives),
        "aupr_out": average_precision(scores, positives, positive="out"),
        "aupr_in": average_precision(scores, positives, positive="in"),
        "fpr95_out": fpr_at_tpr(scores, positives, tpr=0.95, positive="out"),
        "fpr95_in": fpr_at_tpr(scores, positives, tpr=0.95, positive="in"),
        "tpr_at_fpr1": tpr_at_fpr(scores, positives, fpr=0.01),
    }


def check_scores(scores: Tensor, positives: Tensor) -> None:
    """Refuse scores and marks of a wrong shape or kind, without waiting for the device."""
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(
            "Expected argument `scores` to be floating point of shape (N,), "
            f"but got {scores.dtype} of shape {tuple(scores.shape)}."
        )
    if positives.shape != scores.shape or positives.dtype != torch.bool:
        raise ValueError(
            f"Expected argument `positives` to be torch.bool of shape {tuple(scores.shape)}, "
            f"but got {positives.dtype} of shape {tuple(positives.shape)}."
        )


def check_positive(positive: str) -> None:
    """Refuse anything but the two sides."""
    if positive not in ("out", "in"):
        raise ValueError(f'Expected argument `positive` to be "out" or "in", but got {positive!r}.')


def check_tpr(tpr: float) -> None:
    """Refuse a share of positives that no threshold is needed for, or none reaches."""
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"Expected argument `tpr` to be a rate in (0, 1], but got {tpr}.")


def check_fpr(fpr: float) -> None:
    """Refuse a share of false positives that every threshold keeps, or none."""
    if not 0.0 <= fpr < 1.0:
        raise ValueError(f"Expected argument `fpr` to be a rate in [0, 1), but got {fpr}.")


def _counts(scores: Tensor, positives: Tensor, positive: str) -> tuple[Tensor, Tensor]:
    """Count the true and the false positives at each distinct score taken as threshold, from the strictest on.

    Returned as int64 on the CPU, where float64 always exists; the sorting is done on the scores' device.
    """
    check_positive(positive)
    check_scores(scores, positives)
    if scores.numel() == 0:
        raise ValueError("Expected the scores of at least one image, but got none.")
    missing = int(scores.isnan().sum())
    if missing:
        raise ValueError(f"Expected argument `scores` to hold no NaN, but got {missing} of {scores.numel()}.")
    suspicious = int(positives.sum())
    if suspicious in (0, positives.numel()):
        kind = "suspicious" if suspicious else "inconspicuous"
        raise ValueError(f"Expected both suspicious and inconspicuous images, but got only {kind} ones.")
    if positive == "in":
        scores, positives = -scores, ~positives
    ordered, order = scores.detach().sort(descending=True)
    # Compared, not subtracted: the difference of two infinities is NaN, that of two close numbers may be zero.
    last_of_ties = torch.ones_like(positives)
    last_of_ties[:-1] = ordered[1:] != ordered[:-1]
    true = positives[order].cumsum(0)[last_of_ties].cpu()
    flagged = last_of_ties.nonzero().squeeze(1).cpu() + 1
    return true, flagged - true


def _steps(counts: Tensor) -> Tensor:
    """What each threshold adds to the counts."""
    return counts.diff(prepend=counts.new_zeros(1))
