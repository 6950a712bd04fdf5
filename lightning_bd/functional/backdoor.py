"""Rates that measure a backdoor and its removal."""

from statistics import NormalDist

import torch
from torch import Tensor

__all__ = (
    "attack_success_rate",
    "attack_success_rate_all",
    "count_matches",
    "defense_effectiveness_rating",
    "robust_accuracy",
    "wilson_interval",
)


def count_matches(preds: Tensor, wanted: Tensor, other: Tensor, exclude_equal: bool = True) -> tuple[Tensor, Tensor]:
    """Count the predictions that equal ``wanted``, without waiting for the device.

    All rates of triggered images are the ratio of these two counts: with the target as ``wanted`` and the original
    label as ``other`` it is the attack success rate, the other way round the robust accuracy.

    Args:
        preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer. Logits with a NaN
            match nothing.
        wanted: Labels ``(B,)`` to compare with, integer.
        other: The other label of each image, ``(B,)``, integer.
        exclude_equal: Whether images with ``wanted == other``, where the trigger has nothing to change, are left out.

    Returns:
        The number of matches and the number of images, int64 tensors without dimensions on the device of ``preds``.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above.

    Example:
        >>> logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
        >>> count_matches(logits, wanted=torch.tensor([0, 0, 0]), other=torch.tensor([1, 1, 0]))
        (tensor(1), tensor(2))
    """
    if preds.ndim == 2 and preds.is_floating_point():
        # The largest of logits with a NaN is the first NaN: of a broken model always class 0, a usual target.
        preds = torch.where(preds.isnan().any(dim=1), -1, preds.argmax(dim=1))
    elif preds.ndim != 1 or preds.is_floating_point():
        raise ValueError(
            "Expected argument `preds` to be floating point logits of shape (B, K) or integer labels of shape (B,), "
            f"but got {preds.dtype} of shape {tuple(preds.shape)}."
        )
    for labels in (wanted, other):
        if labels.shape != preds.shape or labels.is_floating_point():
            raise ValueError(
                f"Expected arguments `target` and `original` to be integer labels of shape {tuple(preds.shape)}, "
                f"but got {labels.dtype} of shape {tuple(labels.shape)}."
            )
    # Sums of products: selecting by a mask would wait for the device to know the shape.
    counted = wanted != other if exclude_equal else torch.ones_like(wanted, dtype=torch.bool)
    return ((preds == wanted) & counted).sum(), counted.sum()


def attack_success_rate(preds: Tensor, target: Tensor, original: Tensor) -> Tensor:
    """Share of the triggered images that are predicted as the attacker's target, target class excluded.

    Images whose original label is the target already are not counted: they would succeed without a backdoor.

    Args:
        preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer, of triggered images.
        target: Label that the attacker wants for each image, ``(B,)``, integer.
        original: True label of each image, ``(B,)``, integer.

    Returns:
        The rate in [0, 1], a float tensor without dimensions; NaN if no image counts.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above.

    Example:
        >>> preds, target = torch.tensor([0, 0, 2, 0]), torch.zeros(4, dtype=torch.long)
        >>> attack_success_rate(preds, target, original=torch.tensor([0, 1, 2, 3]))
        tensor(0.6667)
    """
    successes, total = count_matches(preds, target, original)
    return successes / total


def attack_success_rate_all(preds: Tensor, target: Tensor, original: Tensor) -> Tensor:
    """Share of the triggered images that are predicted as the attacker's target, target class included.

    A model without a backdoor already scores about the target class's share of the images. Some papers report this
    rate; `attack_success_rate` is the one to compare by.

    Args:
        preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer, of triggered images.
        target: Label that the attacker wants for each image, ``(B,)``, integer.
        original: True label of each image, ``(B,)``, integer; it does not change the result.

    Returns:
        The rate in [0, 1], a float tensor without dimensions; NaN without images.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above.

    Example:
        >>> preds, target = torch.tensor([0, 0, 2, 0]), torch.zeros(4, dtype=torch.long)
        >>> attack_success_rate_all(preds, target, original=torch.tensor([0, 1, 2, 3]))
        tensor(0.7500)
    """
    successes, total = count_matches(preds, target, original, exclude_equal=False)
    return successes / total


def robust_accuracy(preds: Tensor, target: Tensor, original: Tensor) -> Tensor:
    """Share of the triggered images that are still predicted as their original label, target class excluded.

    Args:
        preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer, of triggered images.
        target: Label that the attacker wants for each image, ``(B,)``, integer; decides only which images count.
        original: True label of each image, ``(B,)``, integer.

    Returns:
        The rate in [0, 1], a float tensor without dimensions; NaN if no image counts.

    Raises:
        ValueError: If the shapes or the kinds of numbers differ from the above.

    Example:
        >>> preds, target = torch.tensor([0, 0, 2, 0]), torch.zeros(4, dtype=torch.long)
        >>> robust_accuracy(preds, target, original=torch.tensor([0, 1, 2, 3]))
        tensor(0.3333)
    """
    successes, total = count_matches(preds, original, target)
    return successes / total


def defense_effectiveness_rating(
    clean_accuracy_before: float,
    clean_accuracy_after: float,
    attack_success_rate_before: float,
    attack_success_rate_after: float,
) -> float:
    """Rate a defense by what it takes from the attack and what it costs in accuracy.

    ``(max(0, drop of attack success) - max(0, drop of clean accuracy) + 1) / 2``, the DER of
    `Zhu et al., 2023 <https://arxiv.org/abs/2304.11823>`_: 1 is a full removal at no cost, 0.5 no change, below 0.5
    more cost than gain. Gains of accuracy and of attack success are not counted.

    Args:
        clean_accuracy_before: Accuracy on clean images of the undefended model, in [0, 1].
        clean_accuracy_after: The same of the defended model, in [0, 1].
        attack_success_rate_before: Attack success rate of the undefended model, in [0, 1].
        attack_success_rate_after: The same of the defended model, in [0, 1].

    Returns:
        The rating in [0, 1].

    Raises:
        ValueError: If a rate is outside [0, 1] or NaN.

    Example:
        >>> round(defense_effectiveness_rating(0.93, 0.91, 0.99, 0.03), 4)
        0.97
    """
    rates = {
        "clean_accuracy_before": clean_accuracy_before,
        "clean_accuracy_after": clean_accuracy_after,
        "attack_success_rate_before": attack_success_rate_before,
        "attack_success_rate_after": attack_success_rate_after,
    }
    for name, rate in rates.items():
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"Expected argument `{name}` to be a rate in [0, 1], but got {rate}.")
    removed = max(0.0, attack_success_rate_before - attack_success_rate_after)
    lost = max(0.0, clean_accuracy_before - clean_accuracy_after)
    return (removed - lost + 1.0) / 2.0


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Give the confidence interval of a rate from its counts, by Wilson's score.

    Unlike the normal approximation it stays in [0, 1] and is of use at rates of 0 and 1
    (`Wilson, 1927 <https://doi.org/10.1080/01621459.1927.10502953>`_). It covers the draw of the test images, not the
    seeds of the training.

    Args:
        successes: Number of successes, from 0 to ``total``.
        total: Number of trials, at least 1.
        confidence: Probability that such intervals cover the true rate, in (0, 1).

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> low, high = wilson_interval(successes=9, total=10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    if total < 1:
        raise ValueError(f"Expected argument `total` to be a positive integer, but got {total}.")
    if not 0 <= successes <= total:
        raise ValueError(f"Expected argument `successes` to be in [0, {total}], but got {successes}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"Expected argument `confidence` to be in (0, 1), but got {confidence}.")
    # (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    z, n, p = NormalDist().inv_cdf(0.5 + confidence / 2.0), total, successes / total
    center = p + z**2 / (2 * n)
    half_width = z * (p * (1.0 - p) / n + z**2 / (4 * n**2)) ** 0.5
    scale = 1.0 + z**2 / n
    # Rounding must not move the ends off 0 and 1 where they are exact.
    low = 0.0 if successes == 0 else (center - half_width) / scale
    high = 1.0 if successes == total else (center + half_width) / scale
    return low, high
