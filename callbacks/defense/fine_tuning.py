"""Fine-tuning on clean data, with the learning rate chosen as a defender would."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.training import Loss, allowed_epochs, clean_accuracy, cross_entropy, not_run, train
from lightning_bd.callbacks.isolation import RandomState, copy_tensors, overwrite
from lightning_bd.functional.batch_norm import frozen_running_stats
from lightning_bd.functional.perturbations import sam_perturbation

__all__ = ("FineTuning",)

_Schedule = Literal["cosine", "constant"]


class FineTuning(Defense):
    """Trains the whole model on clean data (``ft``): SGD with a cosine schedule.

    The learning rate decides how much of a backdoor is forgotten. A defender cannot see that, but can see clean
    accuracy: of ``learning_rates`` the largest is taken whose clean *validation* accuracy drops by at most
    ``max_drop``. If none qualifies the smallest is taken and the report says so. Give a single rate to fix it (the
    `SBL <https://arxiv.org/abs/2407.14738>`_ protocol has 0.01).

    With ``rho`` it is FT-SAM (``ft_sam``): each step takes the gradient at the worst weights nearby, which shrinks the
    norms of backdoor-related neurons (`Zhu et al., 2023 <https://arxiv.org/abs/2304.11823>`_). SBL's FT-SAM is
    ``learning_rates=[0.005], schedule="constant", weight_decay=0, rho=0.05``, 50 epochs; like it, this differs from
    Zhu et al. in that the perturbation is not scaled by the weights.

    Use it with ``max_epochs: 0``: it is the whole defense.

    Args:
        learning_rates: Candidates, each positive.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1]; 0.01 is one point.
        max_epochs: Epochs per candidate; SBL: 50. The run's cap applies.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, at least 0; SBL: 5e-4.
        rho: Radius of the neighbourhood of sharpness-aware minimization, at least 0; 0 is plain SGD, bit for bit.
        schedule: ``"cosine"`` to 0 over the epochs, or ``"constant"``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> batches = [(torch.rand(8, 1, 8, 8), torch.arange(8))]
        >>> data = DefenderData(lambda epoch: iter(batches), lambda: iter(batches), num_classes=10)
        >>> report = FineTuning([0.005], max_epochs=2, rho=0.05).purify(small_cnn(10, in_channels=1), data)
        >>> report.epochs, report.note
        (2, 'lr 0.005')
    """

    def __init__(
        self,
        learning_rates: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
        max_drop: float = 0.01,
        max_epochs: int = 50,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        rho: float = 0.0,
        schedule: _Schedule = "cosine",
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
        if not (math.isfinite(rho) and rho >= 0):
            raise ValueError(f"Expected argument `rho` to be a non-negative float, but got {rho}.")
        if schedule not in get_args(_Schedule):
            raise ValueError(f"Expected argument `schedule` to be one of {get_args(_Schedule)}, but got {schedule!r}.")
        self.learning_rates = tuple(learning_rates)
        self.max_drop = max_drop
        self.max_epochs = max_epochs
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.rho = rho
        self.schedule = schedule

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Fine-tune ``model`` in place with the largest learning rate that keeps the clean validation accuracy.

        Raises:
            NotApplicableError: If the model has no parameter that requires a gradient.
            MisconfigurationException: If there are no training or no validation images.
        """
        return self.fine_tune(model, data, cross_entropy)

    def fine_tune(self, model: nn.Module, data: DefenderData, loss: Loss, title: str = "fine-tuning") -> Report:
        """Do what :meth:`purify` does with another loss, for a defense that is fine-tuning with one more term.

        Args:
            model: The model, changed in place.
            data: The defender's clean data.
            loss: What to minimise.
            title: For the progress bar and the warning.

        Raises:
            NotApplicableError: If the model has no parameter that requires a gradient.
        """
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise NotApplicableError("Every parameter is frozen, but fine-tuning needs some to train.")
        if skipped := not_run(data):
            return skipped
        epochs = allowed_epochs(data, self.max_epochs)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before = clean_accuracy(model, data)
        for rate in sorted(self.learning_rates, reverse=True):
            model.load_state_dict(start)
            self._train(model, data, rate, epochs, loss, title)
            after = clean_accuracy(model, data)
            kept = before - after <= self.max_drop + 1e-9  # 0.98 - 0.97 is a little more than 0.01
            if kept:
                break
        values = {"learning_rate": rate, "validation_accuracy_before": before, "validation_accuracy": after}
        note = f"lr {rate:g}"
        if len(self.learning_rates) > 1 and not kept:
            note += f", yet {100 * (before - after):.1f} points of validation accuracy lost"
            warnings.warn(
                f"{title.capitalize()} lost more than {self.max_drop:g} of clean accuracy at every rate.", stacklevel=2
            )
        return Report(epochs, values, note)

    def _train(self, model: nn.Module, data: DefenderData, rate: float, epochs: int, loss: Loss, title: str) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay)
        schedule = CosineAnnealingLR(optimizer, epochs) if self.schedule == "cosine" else None
        step = _sharpness_aware_step(model, optimizer, self.rho) if self.rho > 0 else None
        train(model, data, epochs, optimizer, loss, schedule=schedule, step=step, title=f"{title}, lr {rate:g}")


def _sharpness_aware_step(model: nn.Module, optimizer: Optimizer, rho: float) -> Callable[[Callable[[], Tensor]], None]:
    """Return a step along the gradient at the perturbed weights, from the weights as they are."""
    parameters: list[Tensor] = optimizer.param_groups[0]["params"]

    def step(closure: Callable[[], Tensor]) -> None:
        random_state = RandomState(parameters[0].device)
        closure()
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        perturbation = sam_perturbation([p.grad for p in moved if p.grad is not None], rho)
        weights = copy_tensors(moved)
        try:
            with torch.no_grad():
                torch._foreach_add_(moved, perturbation)
            random_state.restore()  # The same dropout masks.
            with frozen_running_stats(model):
                closure()
        finally:
            overwrite(moved, weights)
        optimizer.step()

    return step
