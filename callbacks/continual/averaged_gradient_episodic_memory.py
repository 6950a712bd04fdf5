"""Averaged gradient episodic memory in any automatically optimised LightningModule."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_bd.callbacks.continual.reference import ReferenceKind, check_reference
from lightning_bd.callbacks.continual.replay_buffer import ReplayBuffer, filled_buffer
from lightning_bd.callbacks.isolation import IsolatedPass, overwrite
from lightning_bd.callbacks.situation import check_situation
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.gradient_projection import agem_projection

__all__ = ("AveragedGradientEpisodicMemory",)


class AveragedGradientEpisodicMemory(Callback):
    r"""Take no step that, to first order, raises the loss on remembered samples of the previous task.

    At the start of the fit a buffer is filled with samples of the previous task. Before each optimizer step a batch is
    drawn from it, and where the step's gradient :math:`g` points against the gradient :math:`r` of the batch's
    cross-entropy at the same weights, it is projected: :math:`g - (g^T r / r^T r) \, r` (A-GEM, `Chaudhry et al., 2019
    <https://arxiv.org/abs/1812.00420>`_; differs from the paper in that there is one previous task, and its samples
    are chosen by reservoir sampling). Other steps are the plain run's, bit for bit.

    :math:`g` is what the optimizer would get: accumulated, unscaled, averaged over the processes, with the terms of
    other callbacks, and that of the second pass under :class:`~lightning_bd.callbacks.SharpnessAwareMinimization`.
    Clipping comes afterwards. Parameters that have no gradient at this step will not be moved, so they count in
    neither vector. Where :math:`r` is zero or not finite the gradient is left alone.

    The module's ``forward`` maps images to logits. It runs on the batch in the mode that the module trains in, for
    :math:`g` and :math:`r` can only be compared as gradients of one function: in training BatchNorm uses the batch's
    own statistics, and dropout is on, as in the paper's code. Nothing else is left of that pass: running statistics,
    metrics, logs and the global random state stay as they were.

    ``a_gem/projected``, the share of steps that were projected since the last record, is logged every
    ``log_every_n_steps`` steps. A checkpoint holds the buffer and the counts, and a resumed fit goes on with them.
    Under DDP all processes hold the same buffer and draw batches of their own, whose gradients are averaged.

    Args:
        capacity: Samples in the buffer, positive; 512 in the code of `Flatness-aware Sequential Learning
            <https://arxiv.org/abs/2407.14738>`_.
        batch_size: Samples of the buffer per step and process, positive; the whole buffer if it holds fewer.
        dataloader: Batches of the previous task; ``batch[0]`` are images in [0, 1], ``batch[1]`` labels. They pass
            through the module's batch transfer hooks. Under DDP each process reads its own loader; give it a
            ``DistributedSampler``, for else the buffer fills with duplicates. None:
            ``trainer.datamodule.reference_batches(device)``, which yields each process its part.
        reference: Which batches the datamodule replays: ``"as_trained"``, triggers included, or ``"clean"``, the same
            images without them, which is what the code named above buffers.
        seed: Seed of the buffer and of the batches that are drawn from it.

    Raises:
        ValueError: If an argument is out of range; when the fit starts, if the images are not in [0, 1].
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS, a strategy other than single
            device and DDP, or without data.

    Example:
        >>> old_task = [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))]
        >>> trainer = Trainer(callbacks=[AveragedGradientEpisodicMemory(dataloader=old_task)], logger=False)
    """

    def __init__(
        self,
        capacity: int = 512,
        batch_size: int = 256,
        dataloader: Iterable[Any] | None = None,
        reference: ReferenceKind = "as_trained",
        seed: int = 0,
    ) -> None:
        for name, value in (("capacity", capacity), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        check_reference(reference)
        self.capacity = capacity
        self.batch_size = batch_size
        self.dataloader = dataloader
        self.reference: ReferenceKind = reference
        self.seed = seed
        self._buffer = ReplayBuffer(capacity, seed)
        self._isolated: IsolatedPass | None = None
        # How many steps were projected, of how many, since the last record.
        self._projected: Tensor | None = None
        self._steps = 0
        self._logged_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Save the buffer, and what is counted for the next record."""
        return {"buffer": self._buffer.state_dict(), "projected": self._projected, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the buffer and the counts from a checkpoint."""
        self._buffer.load_state_dict(state_dict["buffer"])
        self._projected, self._steps = state_dict["projected"], state_dict["steps"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported fit and forget the last one; the state of a resumed one is loaded after this."""
        if stage == "fit":
            self._check(trainer, pl_module)
            self._buffer = ReplayBuffer(self.capacity, self.seed)
            self._projected, self._steps = None, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the buffer, unless a checkpoint held it."""
        self._check(trainer, pl_module)
        if self._buffer.seen == 0:
            self._buffer = filled_buffer(
                trainer,
                pl_module,
                type(self).__name__,
                dataloader=self.dataloader,
                reference=self.reference,
                capacity=self.capacity,
                seed=self.seed,
            )
        self._buffer.to(pl_module.device)
        self._isolated = IsolatedPass(trainer, pl_module)
        if self._projected is not None:
            self._projected = self._projected.to(pl_module.device)
        self._logged_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Project the gradient that the optimizer is about to use."""
        # Optimizers that unscale by themselves come here with a scaled gradient; the projection keeps its scale.
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        parameters = [p for p in parameters if p.grad is not None]
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        reference = trainer.strategy.reduce(self._reference_gradient(trainer, pl_module, parameters), reduce_op="mean")
        projection, projected = agem_projection(gradients, reference)
        # In place, for DDP's buckets may own the gradients.
        overwrite(gradients, projection)
        self._projected = projected.long() if self._projected is None else self._projected + projected
        self._steps += 1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Log the share of projected steps when the loggers record."""
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._projected is None or step == self._logged_step or interval == 0 or step % interval:
            return
        self._logged_step = step
        share = self._projected / self._steps
        self._projected, self._steps = None, 0
        pl_module.log("a_gem/projected", share, on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module."""
        self._isolated = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module; the buffer stays, for a checkpoint that is saved after the fit."""
        self._isolated = None

    def _reference_gradient(self, trainer: Trainer, pl_module: LightningModule, parameters: list[Tensor]) -> Tensor:
        """Gradient of the cross-entropy on a batch of the buffer, as one vector, times any loss scale."""
        assert self._isolated is not None
        generator = keyed_generator(self.seed, "a_gem", trainer.global_step, trainer.global_rank)
        batch = self._buffer.sample(self.batch_size, generator)
        precision = trainer.precision_plugin
        # Not through the strategy's wrapped module: DDP's hooks would take this for the backward pass of a step.
        with self._isolated, torch.enable_grad():
            with precision.train_step_context():
                loss = F.cross_entropy(pl_module(precision.convert_input(batch.images)), batch.labels)
            scaler = getattr(precision, "scaler", None)
            # Small gradients vanish in float16; the projection does not see the scale.
            scaled: Tensor = loss if scaler is None else scaler.scale(loss)
            gradients = torch.autograd.grad(scaled, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in gradients])

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_situation(
            trainer,
            pl_module,
            type(self).__name__,
            instead="project the gradient in `training_step` with `lightning_bd.functional.gradient_projection`",
            lbfgs="changes the gradient and not the loss, which LBFGS compares",
            needs="whole gradients",
        )
