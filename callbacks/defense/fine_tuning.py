"""Fine-tuning on clean data, with the learning rate chosen as a defender would."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from lightning_bd.callbacks.defense.base import DefenderData, Defense, Report
from lightning_bd.callbacks.defense.training import allowed_epochs, clean_accuracy, train

__all__ = ("FineTuning",)


class FineTuning(Defense):
    """Trains the whole model on clean data (``ft``): SGD with a cosine schedule.

    The learning rate decides how much of a backdoor is forgotten. A defender cannot see that, but can see clean
    accuracy: of ``learning_rates`` the largest is taken whose clean *validation* accuracy drops by at most
    ``max_drop``. If none qualifies the smallest is taken and the report says so. Give a single rate to fix it (the
    `SBL <https://arxiv.org/abs/2407.14738>`_ protocol has 0.01).

    Use it with ``max_epochs: 0``: it is the whole defense.

    Args:
        learning_rates: Candidates, each positive.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1]; 0.01 is one point.
        max_epochs: Epochs per candidate; SBL: 50. The run's cap applies.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, at least 0; SBL: 5e-4.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        learning_rates: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
        max_drop: float = 0.01,
        max_epochs: int = 50,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        if not learning_rates or not all(rate > 0 for rate in learning_rates):
            raise ValueError(f"Expected argument `learning_rates` to be positive numbers, but got {learning_rates}.")
        if not 0 <= max_drop <= 1:
            raise ValueError(f"Expected argument `max_drop` to be in [0, 1], but got {max_drop}.")
        if max_epochs < 1:
            raise ValueError(f"Expected argument `max_epochs` to be a positive integer, but got {max_epochs}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected argument `momentum` to be in [0, 1), but got {momentum}.")
        if weight_decay < 0:
            raise ValueError(f"Expected argument `weight_decay` to be a non-negative float, but got {weight_decay}.")
        self.learning_rates = tuple(learning_rates)
        self.max_drop = max_drop
        self.max_epochs = max_epochs
        self.momentum = momentum
        self.weight_decay = weight_decay

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Fine-tune ``model`` in place with the largest learning rate that keeps the clean validation accuracy."""
        epochs = allowed_epochs(data, self.max_epochs)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before = clean_accuracy(model, data)
        for rate in sorted(self.learning_rates, reverse=True):
            model.load_state_dict(start)
            self._train(model, data, rate, epochs)
            after = clean_accuracy(model, data)
            kept = before - after <= self.max_drop + 1e-9  # 0.98 - 0.97 is a little more than 0.01
            if kept:
                break
        values = {"learning_rate": rate, "validation_accuracy_before": before, "validation_accuracy": after}
        note = f"lr {rate:g}"
        if len(self.learning_rates) > 1 and not kept:
            note += f", yet {100 * (before - after):.1f} points of validation accuracy lost"
            warnings.warn(
                f"Fine-tuning lost more than {self.max_drop:g} of clean accuracy at every rate.", stacklevel=2
            )
        return Report(epochs, values, note)

    def _train(self, model: nn.Module, data: DefenderData, rate: float, epochs: int) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        train(model, data, epochs, optimizer, schedule=schedule, title=f"fine-tuning, lr {rate:g}")
