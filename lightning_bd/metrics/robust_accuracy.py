"""Accuracy under the trigger."""

from torch import Tensor

from lightning_bd.functional.backdoor import count_matches
from lightning_bd.metrics._rate import Rate

__all__ = ("RobustAccuracy",)


class RobustAccuracy(Rate):
    """Share of the triggered images that are still predicted as their original label, target class excluded.

    The same images count as for `lightning_bd.metrics.AttackSuccessRate`, so the two rates add up to 1 at most; what
    is missing is predicted as a third class. ``compute`` gives NaN, silently, where no image counted. Pure form:
    `lightning_bd.functional.backdoor.robust_accuracy`.

    Example:
        >>> from torch import tensor
        >>> metric = RobustAccuracy()
        >>> metric.update(preds=tensor([0, 0, 2, 0]), target=tensor([0, 0, 0, 0]), original=tensor([0, 1, 2, 3]))
        >>> metric.compute()
        tensor(0.3333)
    """

    higher_is_better = True

    def update(self, preds: Tensor, target: Tensor, original: Tensor) -> None:
        """Count a batch of triggered images.

        Args:
            preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer.
            target: Label that the attacker wants for each image, ``(B,)``, integer; decides only which images count.
            original: True label of each image, ``(B,)``, integer.

        Raises:
            ValueError: If the shapes or the kinds of numbers differ from the above.
        """
        self._add(*count_matches(preds, original, target))
