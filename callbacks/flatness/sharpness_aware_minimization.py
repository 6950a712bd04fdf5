"""Sharpness-aware minimization in any automatically optimised LightningModule."""

import math
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_bd.callbacks.isolation import copy_tensors, overwrite
from lightning_bd.callbacks.replay import StepReplay, check_replayable
from lightning_bd.functional.perturbations import (
    asam_perturbation,
    global_norm,
    gsam_gradient,
    looksam_direction,
    looksam_gradient,
    sam_perturbation,
)

__all__ = ("SharpnessAwareMinimization",)

_Variant = Literal["sam", "asam", "gsam", "looksam"]


class SharpnessAwareMinimization(Callback):
    r"""Step along the gradient at the worst weights nearby instead of the gradient at the weights.

    Each optimizer step runs ``training_step`` twice: the gradient :math:`g` at the weights :math:`w` gives the
    perturbation :math:`\epsilon`, and the batches are replayed at :math:`w + \epsilon` for the gradient :math:`g_s`
    that the optimizer takes from :math:`w`.

    - ``"sam"``: :math:`\epsilon = \rho g / \lVert g \rVert` (`Foret et al., 2021 <https://arxiv.org/abs/2010.01412>`_).
    - ``"asam"``: invariant to the scale of the weights (`Kwon et al., 2021 <https://arxiv.org/abs/2102.11600>`_).
    - ``"gsam"``: also shrinks the gap between both losses (`Zhuang et al., 2022 <https://arxiv.org/abs/2203.08065>`_);
      differs from the paper in that ``rho`` does not follow the learning rate.
    - ``"looksam"``: SAM every ``interval`` steps, which lends its direction to the steps between
      (`Liu et al., 2022 <https://arxiv.org/abs/2203.02714>`_).

    The module is not changed and needs no change. The second pass draws the same dropout masks and leaves no trace in
    buffers, metrics, logs and random streams; what ``training_step`` keeps in Python attributes, or writes to weights
    itself, it does twice (``second_pass`` tells it when). Gradient clipping and the GradScaler see the final gradient
    only. The hooks around ``backward`` run in both passes, so that penalties of other callbacks are counted in both.
    The batches of one optimizer step are kept in memory until it is done. Where ``training_step`` gives a loss at
    :math:`w` but returns None at :math:`w + \epsilon`, the step is a plain one.

    Args:
        rho: Radius of the neighbourhood, at least 0; 0.05 in the paper for CIFAR, 0.5 to 2 for ``"asam"``. With 0 the
            run is the plain one, bit for bit, at the plain one's cost. May be changed between steps.
        variant: Which of the methods above.
        eta: Stabiliser of ``"asam"``, at least 0; 0.01 in the paper.
        alpha: Weight of the extra term of ``"gsam"`` (default 0.2; 0.2 to 0.4 in the paper) and ``"looksam"`` (default
            0.7, as in the paper), at least 0.
        interval: Number of optimizer steps from one with two passes to the next, at least 1; default 5 for
            ``"looksam"`` (5 to 10 in the paper), 1 otherwise. Between them other variants take the plain gradient.
        sync_perturbation: Under DDP, whether the perturbation comes from the gradient averaged over the processes. If
            not, each process perturbs by its own gradient, which saves one reduction and is known as m-sharpness;
            for ``"sam"`` and ``"asam"`` only, as the others mix both gradients.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At the start of a fit, with manual optimization, a strategy other than single device
            and DDP, ``training_step(dataloader_iter)``, LBFGS, or a second callback of this class.

    Example:
        >>> callback = SharpnessAwareMinimization(rho=0.05, variant="looksam")
        >>> callback.alpha, callback.interval
        (0.7, 5)
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rho: float = 0.05,
        variant: _Variant = "sam",
        eta: float = 0.01,
        alpha: float | None = None,
        interval: int | None = None,
        sync_perturbation: bool = True,
    ) -> None:
        if variant not in get_args(_Variant):
            raise ValueError(f"Expected argument `variant` to be one of {get_args(_Variant)}, but got {variant!r}.")
        self.rho = rho
        self.variant = variant
        self.eta = eta
        self.alpha = {"gsam": 0.2, "looksam": 0.7}.get(variant, 0.0) if alpha is None else alpha
        self.interval = {"looksam": 5}.get(variant, 1) if interval is None else interval
        self.sync_perturbation = sync_perturbation
        for name, value in (("rho", self.rho), ("eta", self.eta), ("alpha", self.alpha)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Expected argument `{name}` to be a non-negative float, but got {value}.")
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"Expected argument `interval` to be a positive integer, but got {self.interval}.")
        if not sync_perturbation and variant in ("gsam", "looksam"):
            raise ValueError(
                f"Expected argument `sync_perturbation` to be True with variant {variant!r}, but got False: each"
                " process would step along a gradient of its own."
            )
        self._steps = 0
        # LookSAM's unit vector, by the position of the parameter in the optimizer.
        self._direction: dict[int, Tensor] = {}
        self._trainer: Trainer | None = None
        self._replay: StepReplay | None = None
        self._displaced: tuple[list[Tensor], list[Tensor]] = ([], [])

    @property
    def second_pass(self) -> bool:
        """Whether the pass at the perturbed weights is running now."""
        return self._replay is not None and self._replay.running

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; each variant has its own."""
        return self._generate_state_key(variant=self.variant)

    def state_dict(self) -> dict[str, Any]:
        """Save the number of steps and LookSAM's direction."""
        return {"steps": self._steps, "direction": dict(self._direction)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of steps and LookSAM's direction from a checkpoint."""
        self._steps = state_dict["steps"]
        self._direction = dict(state_dict["direction"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported fit and forget the last one; the state of a resumed one is loaded after this."""
        if stage == "fit":
            self._check(trainer, pl_module)
            self._steps = 0
            self._direction = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record and replay; by now the module's own ``setup`` has run and the optimizers exist."""
        self._check(trainer, pl_module)
        self._trainer = trainer
        self._direction = {position: part.to(pl_module.device) for position, part in self._direction.items()}
        self._replay = StepReplay(trainer, pl_module, self._is_due, self._finish_gradient, self.sync_perturbation)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget the batches whose gradients are about to be dropped."""
        if self._replay is not None:
            self._replay.forget()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the batch whose gradient is about to be added."""
        if self._replay is not None:
            self._replay.keep()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the weights unperturbed and the strategy as it was."""
        self._restore_weights()
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy as it was."""
        self._stop()

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        check_replayable(trainer, pl_module, name)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, SharpnessAwareMinimization) for callback in callbacks) > 1:
            raise MisconfigurationException(
                f"A Trainer takes one `{name}` callback, but got several. Remove all but one."
            )

    def _stop(self) -> None:
        if self._replay is not None:
            self._replay.remove()
        self._replay = self._trainer = None

    def _is_due(self) -> bool:
        # LookSAM without a direction has nothing to lend: the first attempt overflowed.
        missing = self.variant == "looksam" and not self._direction
        return self.rho > 0 and (missing or self._steps % self.interval == 0)

    @torch.no_grad()
    def _finish_gradient(self, optimizer: Optimizer, recorded: bool) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if recorded:
            self._sharpen_gradient(optimizer, parameters)
        elif self._direction and self.rho > 0:
            self._lend_direction(parameters)
        self._steps += 1

    def _sharpen_gradient(self, optimizer: Optimizer, all_parameters: list[Tensor]) -> None:
        """Replace the gradient at the weights by the one that the variant takes from both passes."""
        assert self._replay is not None
        pairs = [(index, parameter) for index, parameter in enumerate(all_parameters) if parameter.grad is not None]
        positions, parameters = [index for index, _ in pairs], [parameter for _, parameter in pairs]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients or self._overflowed(gradients):
            return
        if self.variant == "asam":
            perturbation = asam_perturbation(gradients, parameters, self.rho, self.eta)
        else:
            perturbation = sam_perturbation(gradients, self.rho)
        uses_both = self.variant in ("gsam", "looksam")
        if uses_both:
            # The second backward pass may write to the same memory: DDP's buckets, CUDA graphs.
            gradients = copy_tensors(gradients)
        for parameter in parameters:
            parameter.grad = None
        self._displaced = (parameters, copy_tensors(parameters))
        try:
            torch._foreach_add_(parameters, perturbation)
            replayed = self._replay.replay(optimizer)
        finally:
            self._restore_weights()
        if not replayed:
            _set_gradients(parameters, gradients)
        elif uses_both:
            self._combine(positions, parameters, gradients)

    def _combine(self, positions: list[int], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        sharp = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.variant == "gsam":
            _set_gradients(parameters, gsam_gradient(gradients, sharp, self.alpha))
            return
        direction = looksam_direction(gradients, sharp)
        # A second pass that overflowed must not spoil the steps to come; it is rare enough to wait for the device.
        if torch.isfinite(global_norm(direction)):
            self._direction = dict(zip(positions, direction, strict=True))

    def _lend_direction(self, all_parameters: list[Tensor]) -> None:
        """Add LookSAM's direction to the plain gradient."""
        lent = [
            (parameter, parameter.grad, self._direction[position])
            for position, parameter in enumerate(all_parameters)
            if parameter.grad is not None and position in self._direction
        ]
        if lent:
            parameters, gradients, direction = ([item[column] for item in lent] for column in range(3))
            _set_gradients(parameters, looksam_gradient(gradients, direction, self.alpha))

    def _overflowed(self, gradients: list[Tensor]) -> bool:
        """Whether the GradScaler will skip this step; its infinite gradients are then left for it to find.

        Only asked with a GradScaler, as the answer has to wait for the device, and never for a local gradient: the
        other processes may have a finite one and run the second pass, so that all must.
        """
        assert self._trainer is not None
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return scaler is not None and self.sync_perturbation and not torch.isfinite(global_norm(gradients))

    def _restore_weights(self) -> None:
        overwrite(*self._displaced)
        self._displaced = ([], [])


def _set_gradients(parameters: list[Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
