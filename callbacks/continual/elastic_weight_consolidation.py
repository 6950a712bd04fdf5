"""Elastic weight consolidation in any automatically optimised LightningModule."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import LBFGS

from lightning_bd.callbacks.continual.quadratic_penalty import QuadraticPenalty
from lightning_bd.callbacks.continual.reference import reference_batches
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.fisher import FisherKind, fisher_sums

__all__ = ("ElasticWeightConsolidation",)


class ElasticWeightConsolidation(Callback):
    r"""Hold the weights that the previous task needs where they are at the start of the fit.

    At the start of the fit the weights are stored as :math:`\theta^*` and the diagonal :math:`F` of the Fisher
    information is measured on data of the previous task. From then on the loss is that of ``training_step`` plus
    :math:`\lambda \sum_i F_i (\theta_i - \theta^*_i)^2` (`Kirkpatrick et al., 2017
    <https://arxiv.org/abs/1612.00796>`_; differs from the paper in that there is no factor 1/2). Every parameter that
    requires a gradient at the start of the fit is held.

    The penalty's gradient is added after each backward pass, as if the penalty were part of the loss: it is scaled by
    the GradScaler, accumulated, clipped, and counted in both passes of
    :class:`~lightning_bd.callbacks.SharpnessAwareMinimization`. The loss that ``training_step`` returns and logs does
    not hold it. ``ewc/penalty`` and ``ewc/share``, the penalty's part of loss plus penalty, are logged every
    ``log_every_n_steps`` steps. A checkpoint holds :math:`F` and :math:`\theta^*`, and a resumed fit goes on with them.

    The module's ``forward`` maps images to logits. The Fisher pass runs it in evaluation mode, leaves no trace in it
    and does not advance the global random state.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is a plain fit, and nothing is measured. The stable range depends on
            the size of :math:`F`, so look at ``ewc/share``; a warning tells when a gradient step would overshoot.
        fisher: How :math:`F` is measured: with the labels of the data (``"empirical"``), over the model's own labels
            (``"exact"``, one backward pass for each class), with one label drawn from them (``"sampled"``), or as the
            code of `Flatness-aware Sequential Learning <https://arxiv.org/abs/2407.14738>`_ does (``"weighted"``). See
            :func:`~lightning_bd.functional.fisher.fisher_diagonal`.
        num_samples: Samples to measure on, positive, all processes together; None takes all.
        dataloader: Batches of the previous task; ``batch[0]`` are images, ``batch[1]`` labels. They pass through the
            module's ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer``. Under
            DDP each process reads its own loader; give it a ``DistributedSampler`` to share the work. None:
            ``trainer.datamodule.reference_batches(device)``, which yields batches on the device, each process its part.
        chunk_size: Samples that are propagated together in the measurement, positive. None: 32 on a CPU, 128 elsewhere.
        max_memory: Bytes that the per-sample gradients of one layer may take, positive. None: 16 MiB on a CPU,
            512 MiB elsewhere.
        seed: Seed of the labels that ``"sampled"`` draws.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS, a strategy other than single
            device and DDP, without data, or with a Fisher information that is not finite.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> old_task = [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))]
        >>> trainer = Trainer(callbacks=[ElasticWeightConsolidation(strength=10.0, dataloader=old_task)], logger=False)
    """

    def __init__(
        self,
        strength: float = 1.0,
        fisher: FisherKind = "empirical",
        num_samples: int | None = None,
        dataloader: Iterable[Any] | None = None,
        chunk_size: int | None = None,
        max_memory: int | None = None,
        seed: int = 0,
    ) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"Expected argument `strength` to be a non-negative float, but got {strength}.")
        if fisher not in get_args(FisherKind):
            raise ValueError(f"Expected argument `fisher` to be one of {get_args(FisherKind)}, but got {fisher!r}.")
        for name, value in (("num_samples", num_samples), ("chunk_size", chunk_size), ("max_memory", max_memory)):
            if value is not None and value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer or None, but got {value}.")
        self.strength = float(strength)
        self.fisher: FisherKind = fisher
        self.num_samples = num_samples
        self.dataloader = dataloader
        self.chunk_size = chunk_size
        self.max_memory = max_memory
        self.seed = seed
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._penalty: QuadraticPenalty | None = None
        self._logged_step = 0

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; a fit resumed with another strength keeps the state."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Save the Fisher diagonal and the anchored weights."""
        return {"fisher": dict(self._fisher), "anchor": dict(self._anchor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the Fisher diagonal and the anchored weights from a checkpoint."""
        self._fisher = dict(state_dict["fisher"])
        self._anchor = dict(state_dict["anchor"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported fit and forget the last one; the state of a resumed one is loaded after this."""
        if stage == "fit":
            self._check(trainer, pl_module)
            self._fisher, self._anchor = {}, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Anchor the weights and measure the Fisher diagonal, unless a checkpoint held them."""
        self._check(trainer, pl_module)
        if self.strength == 0:
            return
        if not self._anchor:
            self._measure(trainer, pl_module)
        self._penalty = QuadraticPenalty(pl_module, self._fisher, self._anchor, self.strength)
        self._logged_step = trainer.global_step
        self._check_curvature(trainer, self._penalty.largest_curvature())

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
        penalty = self._penalty.value()
        pl_module.log("ewc/penalty", penalty, on_step=True, on_epoch=False, batch_size=1)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            # The loop has divided the loss by the number of accumulated batches.
            loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
            pl_module.log("ewc/share", penalty / (loss + penalty), on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module's parameters."""
        self._penalty = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module's parameters; the state stays, for a checkpoint that is saved after the fit."""
        self._penalty = None

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"`{name}` needs automatic optimization, but `{type(pl_module).__name__}` sets"
                " `automatic_optimization = False`. Remove that line, or add the penalty in `training_step`."
            )
        strategy = trainer.strategy
        supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        if not supported or isinstance(strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"`{name}` needs whole weights on every device and does not support `{type(strategy).__name__}`."
                ' Use `Trainer(devices=1)` or `Trainer(strategy="ddp")`.'
            )
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"`{name}` adds to the gradient and not to the loss, which LBFGS compares. Use another optimizer, for"
                " example SGD or AdamW."
            )

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"Measuring the {self.fisher} Fisher diagonal of the weights to be anchored.")
        start = time.perf_counter()
        with isolate_rng():
            sums, count = fisher_sums(
                pl_module,
                reference_batches(trainer, pl_module, self.dataloader, type(self).__name__),
                self.fisher,
                num_samples=_share(self.num_samples, trainer.global_rank, trainer.world_size),
                chunk_size=self.chunk_size,
                max_memory=self.max_memory,
                generator=keyed_generator(self.seed, "fisher", trainer.global_rank),
            )
        total = int(trainer.strategy.reduce(torch.tensor(count, device=pl_module.device), reduce_op="sum"))
        if total == 0:
            raise MisconfigurationException(
                f"`{type(self).__name__}` got no sample to measure the Fisher information on. Pass a `dataloader` that"
                " is not empty (nor exhausted, if it is an iterator)."
            )
        self._fisher = {
            name: trainer.strategy.reduce(tensor, reduce_op="sum").div_(total) for name, tensor in sums.items()
        }
        self._anchor = {name: p.detach().clone() for name, p in pl_module.named_parameters() if name in sums}
        rank_zero_info(f"Measured on {total} samples in {time.perf_counter() - start:.1f} s.")

    def _check_curvature(self, trainer: Trainer, curvature: float) -> None:
        name = type(self).__name__
        if not math.isfinite(curvature):
            raise MisconfigurationException(
                f"`{name}` measured a Fisher information that is not finite. Check that the weights at the start of"
                " the fit and the images are finite."
            )
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # A warm-up may start near zero.
        rate = max((float(value) for g in groups for value in (g["lr"], g.get("initial_lr", 0.0))), default=0.0)
        if rate * curvature > 1:
            rank_zero_warn(
                f"`{name}`: learning rate times 2 * strength * max(F) is {rate:.3g} * {curvature:.3g} ="
                f" {rate * curvature:.3g}. Above 1 a step of gradient descent overshoots the anchor, above 2 it"
                f" diverges. Lower `strength` (now {self.strength:g}) or the learning rate, or clip the gradient."
            )


def _share(num_samples: int | None, rank: int, world_size: int) -> int | None:
    return None if num_samples is None else num_samples // world_size + (rank < num_samples % world_size)

