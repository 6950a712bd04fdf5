"""Synaptic intelligence in any automatically optimised LightningModule."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_bd.callbacks.continual.quadratic_regularizer import QuadraticRegularizer
from lightning_bd.callbacks.isolation import copy_tensors

__all__ = ("SynapticIntelligence",)


class SynapticIntelligence(QuadraticRegularizer):
    r"""Hold the weights that lowered the loss of earlier tasks where they are at the start of the fit.

    While a task is trained, each step adds :math:`-g_i \Delta\theta_i` to the path integral :math:`\omega_i`, with
    :math:`g` the gradient of the task's loss and :math:`\Delta\theta` what the step did to the weights. When the fit
    has ended, :math:`\Omega_i \leftarrow \Omega_i + \max(\omega_i, 0) / ((\theta_i - \theta^*_i)^2 + \xi)`, where
    :math:`\theta^*` are the weights at its start. The next fit's loss is that of ``training_step`` plus
    :math:`\lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2`, with its own :math:`\theta^*` (`Zenke et al., 2017
    <https://arxiv.org/abs/1703.04200>`_; differs from the paper's equations in that a negative :math:`\omega_i`, a
    weight that made the loss worse, counts as 0: it would push the weight away).

    So the callback takes part in each task: in the first it only keeps account, from the second on it also penalises.
    The same object fitted several times does so by itself; another one is given the importance by
    ``after.carry_over(before.carried_state())``. No data is needed.

    :math:`g` is the gradient that the optimizer is about to use, unscaled and before clipping, without this callback's
    penalty (that of other callbacks counts as the task's); :math:`\Delta\theta` is what it made of it, momentum, weight
    decay and clipping included. With :class:`~lightning_bd.callbacks.SharpnessAwareMinimization` that is the gradient
    at the perturbed weights: the loss whose decrease is attributed is the one that the run minimises, and the gradient
    at the weights no longer exists. Without ``"gsam"`` and ``"looksam"``, which mix two gradients, the penalty is taken
    off exactly.

    The penalty's gradient is added after each backward pass, as if the penalty were part of the loss. ``si/penalty``
    and ``si/share``, the penalty's part of loss plus penalty, are logged every ``log_every_n_steps`` steps. A
    checkpoint holds :math:`\Omega`, :math:`\theta^*` and :math:`\omega`, and a resumed fit goes on with them. Besides
    these, three tensors of the weights' size (two without a penalty) are held while a step is taken.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is a plain fit, in which :math:`\omega` is accumulated all the same.
            0.1 in the paper for permuted MNIST. A warning tells when a gradient step would overshoot.
        xi: :math:`\xi`, positive; bounds :math:`\Omega` of weights that hardly moved; 0.1 and 0.001 in the paper.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS, a strategy other than single
            device and DDP, or with an importance that is not finite or that of another model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SynapticIntelligence(strength=0.1)], logger=False)
    """

    log_prefix: ClassVar[str] = "si"

    def __init__(self, strength: float = 1.0, xi: float = 0.1) -> None:
        super().__init__(strength)
        if not (math.isfinite(xi) and xi > 0):
            raise ValueError(f"Expected argument `xi` to be a positive float, but got {xi}.")
        self.xi = float(xi)
        self._path: dict[str, Tensor] = {}
        self._step: _Step | None = None
        # What .grad holds of the penalty, and from how many backward passes.
        self._penalty_gradient: dict[str, Tensor] = {}
        self._backwards = 0

    def state_dict(self) -> dict[str, Any]:
        """Save the importance of earlier tasks, the anchored weights and the path integral."""
        return {**super().state_dict(), "path": dict(self._path)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the importance of earlier tasks, the anchored weights and the path integral from a checkpoint."""
        super().load_state_dict(state_dict)
        self._path = dict(state_dict["path"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or go on to accumulate."""
        super().on_fit_start(trainer, pl_module)
        parameters = dict(pl_module.named_parameters())
        self._path = {name: tensor.to(parameters[name].device) for name, tensor in self._path.items()}

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget the penalty's part of the gradients, which are about to be dropped."""
        self._forget_gradient()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forget the penalty's part where the gradients were dropped, as they are before SAM's second pass."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # Those of parameters that no optimizer has are never dropped.
        if self._backwards and all(p.grad is None for group in groups for p in group["params"]):
            self._forget_gradient()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the penalty's gradient, and remember what was added."""
        super().on_after_backward(trainer, pl_module)
        if self._penalty is not None:
            # The passes of one accumulated gradient are at the same weights.
            self._backwards += 1
            self._penalty_gradient = self._penalty.gradient(self._backwards / trainer.accumulate_grad_batches)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the task's gradient and the weights, before clipping."""
        parameters = {name: p for name, p in pl_module.named_parameters() if name in self._path and p.grad is not None}
        if not parameters:
            return
        gradients = copy_tensors([p.grad for p in parameters.values() if p.grad is not None])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                # A fused optimizer unscales inside its step.
                torch._foreach_div_(gradients, scaler.scale(torch.ones((), device=pl_module.device)))
            for gradient in gradients:
                # The scaler skips such a step: nothing moves, and nothing may be added.
                gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        for name, gradient in zip(parameters, gradients, strict=True):
            if name in self._penalty_gradient:
                gradient -= self._penalty_gradient[name]
        self._step = _Step(parameters, gradients, copy_tensors(list(parameters.values())))

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Add the step to the path integral; log the penalty after the steps that the loggers record."""
        if self._step is not None:
            parameters, gradients, before = self._step
            # In place, lest it be one more tensor of the weights' size.
            torch._foreach_sub_(before, list(parameters.values()))
            for name, gradient, back in zip(parameters, gradients, before, strict=True):
                path = self._path[name]
                path.addcmul_(gradient.to(path.dtype), back.to(path.dtype))
            self._step = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module's parameters."""
        super().on_exception(trainer, pl_module, exception)
        self._step = None
        self._forget_gradient()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        self._path = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in pl_module.named_parameters()
            if p.requires_grad
        }
        return {
            **{name: torch.zeros_like(tensor) for name, tensor in self._path.items()},
            **self._carried_for(pl_module),
        }

    def _finish(self, pl_module: LightningModule) -> dict[str, Tensor]:
        weights = dict(pl_module.named_parameters())
        finished = dict(self._importance)
        for name, path in self._path.items():
            moved = weights[name].detach().to(path) - self._anchor[name].to(path)
            finished[name] = path.clamp(min=0) / (moved.square() + self.xi) + finished[name].to(path)
        return finished

    def _forget_gradient(self) -> None:
        self._penalty_gradient, self._backwards = {}, 0


class _Step(NamedTuple):
    parameters: Mapping[str, Tensor]
    gradients: list[Tensor]
    weights: list[Tensor]
