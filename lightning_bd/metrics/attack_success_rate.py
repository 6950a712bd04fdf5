"""Attack success rates."""

from torch import Tensor, tensor
from torchmetrics import Metric

from lightning_bd.functional.backdoor import count_matches

__all__ = ("AttackSuccessRate", "AttackSuccessRateAll")


class AttackSuccessRate(Metric):
    """Share of the triggered images that are predicted as the attacker's target, target class excluded.

    Images whose original label is the target already are not counted: they would succeed without a backdoor. The target
    is given for each image, so that all-to-one, all-to-all and source-specific attacks are measured alike. Two int64
    sums are kept, added up over batches and over processes; ``update`` does not wait for the device. ``compute`` gives
    NaN, silently, where no image counted. Pure form: `lightning_bd.functional.backdoor.attack_success_rate`.

    Example:
        >>> from torch import tensor
        >>> metric = AttackSuccessRate()
        >>> metric.update(preds=tensor([0, 0, 2, 0]), target=tensor([0, 0, 0, 0]), original=tensor([0, 1, 2, 3]))
        >>> metric.compute()
        tensor(0.6667)
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    attack_successes: Tensor
    attacked_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A MetricCollection takes metrics whose states agree in all names and values for one: no other has these names.
        self.add_state("attack_successes", default=tensor(0), dist_reduce_fx="sum")
        self.add_state("attacked_images", default=tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, original: Tensor) -> None:
        """Count a batch of triggered images.

        Args:
            preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer.
            target: Label that the attacker wants for each image, ``(B,)``, integer.
            original: True label of each image, ``(B,)``, integer.

        Raises:
            ValueError: If the shapes or the kinds of numbers differ from the above.
        """
        successes, images = count_matches(preds, target, original)
        self.attack_successes = self.attack_successes + successes
        self.attacked_images = self.attacked_images + images

    def compute(self) -> Tensor:
        """Divide the counts over all batches and processes; NaN where no image counted."""
        return self.attack_successes / self.attacked_images


class AttackSuccessRateAll(Metric):
    """Share of the triggered images that are predicted as the attacker's target, target class included.

    A model without a backdoor already scores about the target class's share of the images. Some papers report this
    rate; `AttackSuccessRate` is the one to compare by. Pure form:
    `lightning_bd.functional.backdoor.attack_success_rate_all`.

    Example:
        >>> from torch import tensor
        >>> metric = AttackSuccessRateAll()
        >>> metric.update(preds=tensor([0, 0, 2, 0]), target=tensor([0, 0, 0, 0]), original=tensor([0, 1, 2, 3]))
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    attack_successes_all: Tensor
    triggered_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A MetricCollection takes metrics whose states agree in all names and values for one: no other has these names.
        self.add_state("attack_successes_all", default=tensor(0), dist_reduce_fx="sum")
        self.add_state("triggered_images", default=tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, original: Tensor) -> None:
        """Count a batch of triggered images.

        Args:
            preds: Logits or scores ``(B, K)``, floating point, or predicted labels ``(B,)``, integer.
            target: Label that the attacker wants for each image, ``(B,)``, integer.
            original: True label of each image, ``(B,)``, integer; it does not change the result.

        Raises:
            ValueError: If the shapes or the kinds of numbers differ from the above.
        """
        successes, images = count_matches(preds, target, original, exclude_equal=False)
        self.attack_successes_all = self.attack_successes_all + successes
        self.triggered_images = self.triggered_images + images

    def compute(self) -> Tensor:
        """Divide the counts over all batches and processes; NaN where no image counted."""
        return self.attack_successes_all / self.triggered_images
