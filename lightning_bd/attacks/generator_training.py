"""The optimizer of a trigger that is trained with the model that it attacks."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ("GeneratorTraining", "average_gradients")


class GeneratorTraining(Callback):
    """Lets a backward pass of the model reach the trigger's network, and steps its optimizer beside the model's.

    :class:`~lightning_bd.attacks.base.GeneratorAttack` adds it to the Trainer of a poisoned phase. The gradient is that
    of the last pass over the batch (the second one with
    :class:`~lightning_bd.callbacks.SharpnessAwareMinimization`), accumulated and averaged over processes like the
    model's; it is not clipped. A batch without triggered images leaves the network alone. When the fit ends, also by an
    exception, the network is frozen again.
    """

    def __init__(self) -> None:
        self._trained: list[tuple[nn.Parameter, bool]] = []
        self._optimizer: Optimizer | None = None
        self._resumed: dict[str, Any] | None = None
        self._data: Any = None
        self._replays = False
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return {} if self._optimizer is None else {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of an earlier attempt; the network's weights come with the model's."""
        self._resumed = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit whose optimizer step this cannot follow."""
        pl_module.check_fit()  # type: ignore[operator]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the network unless it was, and make its optimizer."""
        model: Any = pl_module
        trigger = model.trigger
        trigger.to(pl_module.device)
        self._data = trainer.datamodule  # type: ignore[attr-defined]
        self._data.keeps_clean_images = True
        if self._resumed is None:
            model.prepare_trigger(trigger)
        parameters = model.trained_parameters(trigger)
        self._trained = [(parameter, parameter.requires_grad) for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._optimizer = model.generator_optimizer(parameters)
        if self._resumed is not None:
            self._optimizer.load_state_dict(self._resumed["optimizer"])
        self._step = trainer.global_step

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin a gradient, when the model's begins."""
        self._replays = False
        self._forget_gradient()

    def on_replay_batch_start(self, batch: object) -> None:
        """Begin it anew: SAM computes that of the step at other weights."""
        if not self._replays:
            self._replays = True
            self._forget_gradient()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Step the network's optimizer, if the model's has stepped."""
        if trainer.global_step == self._step or self._optimizer is None:
            return
        self._step = trainer.global_step
        if pl_module.trains_trigger(trainer.current_epoch):  # type: ignore[operator]
            parameters = [parameter for parameter, _ in self._trained]
            if average_gradients(trainer, parameters):
                self._optimizer.step()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Freeze the network."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze the network."""
        self._stop()

    def _forget_gradient(self) -> None:
        for parameter, _ in self._trained:
            parameter.grad = None

    def _stop(self) -> None:
        self._forget_gradient()
        for parameter, required in self._trained:
            parameter.requires_grad_(required)
        self._trained, self._optimizer, self._resumed = [], None, None
        if self._data is not None:
            self._data.keeps_clean_images = False
        self._data = None


def average_gradients(trainer: Trainer, parameters: Sequence[nn.Parameter]) -> bool:
    """Average the gradients over the processes, in place; one without a gradient counts as zero.

    Args:
        trainer: The Trainer.
        parameters: The same in all processes.

    Returns:
        Whether there is a gradient at all.
    """
    found = any(parameter.grad is not None for parameter in parameters)
    if trainer.world_size == 1:
        return found
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor([float(found)])])
    mean: Tensor = trainer.strategy.reduce(flat, reduce_op="mean")
    means = torch.split(mean[:-1], [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, means, strict=True):
        parameter.grad = part.view_as(parameter).clone()
    return bool(mean[-1] > 0)
