"""Accuracy under the trigger."""

from torch import Tensor, tensor
from torchmetrics import Metric

from lightning_bd.functional.backdoor import count_matches

__all__ = ("RobustAccuracy",)


class RobustAccuracy(Metric):
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

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    robust_predictions: Tensor
    attacked_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A MetricCollection takes metrics whose states agree in all names and values for one: no other has these names.
        self.add_state("robust_predictions", default=tensor(0), dist_reduce_fx="sum")
        self.add_state("attacked_images", default=tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, original: Tensor) -> None:
        """Count a batch of triggered images.

        Args:
            preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer.
            target: Label that the attacker wants for each image, ``(B,)``, integer; decides only which images count.
            original: True label of each image, ``(B,)``, integer.

        Raises:
            ValueError: If the shapes or the kinds of numbers differ from the above.
        """
        successes, images = count_matches(preds, original, target)
        self.robust_predictions = self.robust_predictions + successes
        self.attacked_images = self.attacked_images + images

    def compute(self) -> Tensor:
        """Divide the counts over all batches and processes; NaN where no image counted."""
        return self.robust_predictions / self.attacked_images
