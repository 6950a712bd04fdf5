"""What the callbacks that add a quadratic penalty on the distance from earlier weights have in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_bd.callbacks.continual.quadratic_penalty import QuadraticPenalty
from lightning_bd.callbacks.situation import check_situation

__all__ = ("QuadraticRegularizer",)


class QuadraticRegularizer(Callback, ABC):
    r"""Add a quadratic penalty on the distance from the weights at the start of the fit; a subclass weights it.

    The penalty is :math:`\lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2`. A resumed fit goes on with the
    :math:`\Omega` and :math:`\theta^*` of its checkpoint. What a later fit may build on is kept when a fit has ended:
    the same object finds it by itself; another one (a phase with callbacks of its own, another process) is given it
    by ``after.carry_over(before.carried_state())``. A fit that ended by an exception does not count.

    Args:
        strength: :math:`\lambda`, at least 0.

    Raises:
        ValueError: If ``strength`` is out of range.
    """

    #: Prefix of the logged values.
    log_prefix: ClassVar[str]
    #: What the importance is called in messages, and its symbol.
    noun: ClassVar[str] = "importance"
    symbol: ClassVar[str] = "Omega"
    #: Key of the importance in a checkpoint.
    importance_key: ClassVar[str] = "importance"

    def __init__(self, strength: float) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"Expected argument `strength` to be a non-negative float, but got {strength}.")
        self.strength = float(strength)
        self._importance: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._carried: dict[str, Tensor] = {}
        self._penalty: QuadraticPenalty | None = None
        self._logged_step = 0

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; a fit resumed with another strength keeps the state."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Save the importance and the anchored weights, with which a resumed fit goes on."""
        return {self.importance_key: dict(self._importance), "anchor": dict(self._anchor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the importance and the anchored weights from a checkpoint."""
        self._importance = dict(state_dict[self.importance_key])
        self._anchor = dict(state_dict["anchor"])

    def carried_state(self) -> dict[str, Any]:
        """Return what a later fit builds on: the importance by parameter name, empty before a fit has ended."""
        return {"carried": dict(self._carried)}

    def carry_over(self, state: dict[str, Any]) -> None:
        """Let the next fit build on an earlier one, by another object; a resumed fit has built on it already.

        Args:
            state: The ``carried_state()`` of a callback of the same class.

        Raises:
            ValueError: If it is something else.
        """
        if set(state) != {"carried"}:
            raise ValueError(
                "Expected argument `state` to be what `carried_state()` returned, with the key 'carried', but got the"
                f" keys {sorted(state)}."
            )
        self._carried = dict(state["carried"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported fit and start afresh; the state of a resumed one is loaded after this."""
        if stage == "fit":
            self._check(trainer, pl_module)
            self._importance, self._anchor = {}, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Anchor the weights and find their importance, unless a checkpoint held them."""
        self._check(trainer, pl_module)
        if not self._anchor:
            self._importance = self._start(trainer, pl_module)
            parameters = dict(pl_module.named_parameters())
            self._anchor = {name: parameters[name].detach().clone() for name in self._importance}
        if self.strength > 0 and self._importance:
            self._penalty = QuadraticPenalty(pl_module, self._importance, self._anchor, self.strength)
            self._check_curvature(trainer, self._penalty.largest_curvature())
        self._logged_step = trainer.global_step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the penalty's gradient; SAM's second pass comes here too."""
        if self._penalty is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # The public way to the scaler's factor that does not wait for the device.
        loss_scale = None if scaler is None else scaler.scale(torch.ones((), device=pl_module.device))
        self._penalty.add_gradient(1 / trainer.accumulate_grad_batches, loss_scale)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Log the penalty after the steps that the loggers record."""
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._penalty is None or step == self._logged_step or interval == 0 or step % interval:
            return
        self._logged_step = step
        penalty, prefix = self._penalty.value(), self.log_prefix
        pl_module.log(f"{prefix}/penalty", penalty, on_step=True, on_epoch=False, batch_size=1)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            # The loop has divided the loss by the number of accumulated batches.
            loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
            pl_module.log(f"{prefix}/share", penalty / (loss + penalty), on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module's parameters."""
        self._penalty = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep what a later fit builds on; the state stays, for a checkpoint that is saved after the fit."""
        self._penalty = None
        if stage == "fit" and self._anchor:
            self._carried = self._finish(pl_module)

    @abstractmethod
    def _start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the importance, by parameter name, for a fit that is not a resumed one."""

    def _finish(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return what a later fit builds on."""
        return self._importance

    def _carried_for(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return what earlier fits left, on the devices of the parameters."""
        parameters = dict(pl_module.named_parameters())
        for name, tensor in self._carried.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                there = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such parameter"
                raise MisconfigurationException(
                    f"`{type(self).__name__}` carries the {self.noun} of another model: {name!r} has shape"
                    f" {tuple(tensor.shape)}, but here {there}. Use a new callback, or leave out `carry_over`."
                )
        return {name: tensor.to(parameters[name].device) for name, tensor in self._carried.items()}

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_situation(
            trainer,
            pl_module,
            type(self).__name__,
            instead="add the penalty in `training_step`",
            lbfgs="adds to the gradient and not to the loss, which LBFGS compares",
        )

    def _check_curvature(self, trainer: Trainer, curvature: float) -> None:
        name, symbol = type(self).__name__, self.symbol
        if not math.isfinite(curvature):
            raise MisconfigurationException(
                f"`{name}`: the {self.noun} is not finite. Check that the weights at the start of the fit and the"
                " images are finite."
            )
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # A warm-up may start near zero.
        rate = max((float(value) for g in groups for value in (g["lr"], g.get("initial_lr", 0.0))), default=0.0)
        if rate * curvature > 1:
            rank_zero_warn(
                f"`{name}`: learning rate times 2 * strength * max({symbol}) is {rate:.3g} * {curvature:.3g} ="
                f" {rate * curvature:.3g}. Above 1 a step of gradient descent overshoots the anchor, above 2 it"
                f" diverges. Lower `strength` (now {self.strength:g}) or the learning rate, or clip the gradient."
            )
