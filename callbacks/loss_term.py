"""Base of the callbacks that add a term to the loss of any automatically optimised LightningModule."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_bd.callbacks.isolation import RandomState, copy_tensors
from lightning_bd.callbacks.situation import check_situation
from lightning_bd.functional.replaced import call_with

__all__ = ("LossTerm",)


class LossTerm(Callback, ABC):
    r"""Add ``strength`` times a term of the current batch to the loss, just before its backward pass.

    A subclass says what the term is, in :meth:`compute`, and names it with ``log_name``. The term becomes part of the
    loss tensor: it is accumulated, scaled by the GradScaler, clipped, reduced by DDP, and counted in both passes of
    :class:`~lightning_bd.callbacks.SharpnessAwareMinimization`, each with the batch that is running, wherever the
    callbacks stand in the list. The loss that ``training_step`` returns and logs does not hold it.

    ``{log_name}/penalty``, the last batch's term times ``strength``, and ``{log_name}/share``, its part of loss plus
    penalty, are logged every ``log_every_n_steps`` steps; the values are those of the backward pass, and under DDP
    those of the process that logs. With ``strength`` 0 the run is the plain one, bit for bit, and nothing is computed.

    The random streams are as before when :meth:`compute` returns, so that a term does not shift the draws of the run.

    Args:
        strength: Factor of the term, at least 0.

    Raises:
        ValueError: If ``strength`` is out of range.
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS,
            ``training_step(dataloader_iter)``, a strategy other than single device and DDP, or DDP's
            ``find_unused_parameters``.

    Example:
        >>> class SmallLogits(LossTerm):
        ...     '''Keep the logits small.'''
        ...     log_name = "small_logits"
        ...     def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
        ...         return self.logits(pl_module, batch).square().mean()
        >>> trainer = Trainer(callbacks=[SmallLogits(strength=0.1)], logger=False)
    """

    #: What the logged values are called: ``{log_name}/penalty`` and ``{log_name}/share``.
    log_name: ClassVar[str]

    def __init__(self, strength: float) -> None:
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"Expected argument `strength` to be a non-negative float, but got {strength}.")
        self.strength = float(strength)
        self._capture = _LogitCapture()
        self._handle: RemovableHandle | None = None
        self._batch: object = None
        self._replayed = False
        self._penalty: Tensor | None = None
        self._logged_step = 0

    @abstractmethod
    def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
        """Return the term of one batch, without ``strength``.

        Called with gradients enabled and in the fit's precision, after ``training_step`` has given the loss of the
        batch and before that is propagated. No tensor of the module may be written in place here, its buffers
        included: autograd may still need it.

        Args:
            trainer: The trainer that is fitting.
            pl_module: The module that is fitted, as ``training_step`` left it.
            batch: What ``training_step`` got: the batch after ``on_after_batch_transfer``.

        Returns:
            A tensor without dimensions.
        """

    def images(self, batch: object) -> Tensor:
        """Return ``batch[0]``.

        Args:
            batch: The batch that :meth:`compute` got.

        Raises:
            MisconfigurationException: If the batch is not a sequence that starts with a tensor.
        """
        if not (isinstance(batch, Sequence) and len(batch) > 0 and isinstance(batch[0], Tensor)):
            raise MisconfigurationException(
                f"`{type(self).__name__}` takes the images from `batch[0]`, but the batch is a"
                f" `{type(batch).__name__}`. Let the dataset, or the module's `on_after_batch_transfer`, return"
                " `(images, labels)`."
            )
        images: Tensor = batch[0]
        return images

    def logits(self, pl_module: LightningModule, batch: object) -> Tensor:
        """Return the logits ``(B, K)`` of the batch's images, at the weights that the loss was computed with.

        Where ``training_step`` has called the module on ``batch[0]`` itself, these are taken and nothing is computed.
        Otherwise (it calls a submodule, or augments the images) the module is called once more for all terms, in its
        present mode, which costs a forward and a backward pass. That call works on copies of the buffers, so that
        the statistics of BatchNorm count the batch once; what else ``forward`` does, such as logging, it does again.

        Args:
            pl_module: The module that :meth:`compute` got.
            batch: The batch that :meth:`compute` got.

        Raises:
            MisconfigurationException: If the module's ``forward`` does not return a logit tensor.
        """
        images = self.images(batch)
        logits = self._capture.take(images)
        if logits is None:
            buffers = dict(pl_module.named_buffers())
            copies = dict(zip(buffers, copy_tensors(list(buffers.values())), strict=True))
            logits = call_with(pl_module, copies, images)
        if not (isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(images)):
            raise MisconfigurationException(
                f"`{type(self).__name__}` needs logits (B, K), but the `forward` of `{type(pl_module).__name__}` does"
                " not return such a tensor for `batch[0]`. Let it map images to logits."
            )
        return logits

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported fit."""
        if stage == "fit":
            self._check(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again, for by now the module's own ``setup`` has run and the optimizers exist."""
        self._check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch the module's calls, after all callbacks that copy the module at the start of the fit."""
        self._logged_step = trainer.global_step
        if self.strength > 0:
            self._handle = pl_module.register_forward_hook(self._capture)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Remember the batch."""
        self._penalty = None
        self._expect(batch, replayed=False)

    def on_replay_batch_start(self, batch: object) -> None:
        """Remember the batch that SAM runs again."""
        self._expect(batch, replayed=True)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the term; SAM's second pass comes here too."""
        if self._handle is None:
            return
        state = RandomState(trainer.strategy.root_device)
        try:
            with trainer.precision_plugin.train_step_context():
                penalty = self.strength * self.compute(trainer, pl_module, self._batch)
        finally:
            state.restore()
            self._capture.expect(None)
        if not self._replayed:
            self._penalty = penalty.detach()
        penalty = penalty / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # What this hook returns is ignored, but the loss is a tensor that was made for this backward pass.
        loss.add_(penalty if scaler is None else scaler.scale(penalty))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Let go of the batch, and log the term after the steps that the loggers record."""
        penalty = self._penalty
        self._penalty = None
        self._expect(None, replayed=False)
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if penalty is None or step == self._logged_step or interval == 0 or step % interval:
            return
        self._logged_step = step
        pl_module.log(f"{self.log_name}/penalty", penalty, on_step=True, on_epoch=False, batch_size=1)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            # The loop has divided the loss by the number of accumulated batches.
            loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
            share = penalty / (loss + penalty)
            pl_module.log(f"{self.log_name}/share", share, on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._stop()

    def _expect(self, batch: object, replayed: bool) -> None:
        self._batch, self._replayed = batch, replayed
        first = batch[0] if isinstance(batch, Sequence) and len(batch) > 0 else None
        self._capture.expect(first if isinstance(first, Tensor) else None)

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._penalty = None
        self._expect(None, replayed=False)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_situation(
            trainer,
            pl_module,
            type(self).__name__,
            instead="add the term in `training_step`",
            lbfgs="adds to the loss for the backward pass only, and not to that which LBFGS compares",
            batches="needs each batch",
        )
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("find_unused_parameters"):
            raise MisconfigurationException(
                f"`{type(self).__name__}` adds to the loss after DDP has looked for unused parameters, so that it"
                ' cannot be used with `find_unused_parameters=True`. Use `Trainer(strategy="ddp")`, and set'
                " `requires_grad_(False)` on the parameters that are not used."
            )


class _LogitCapture:
    """Forward hook that keeps what the module makes of the images that it is told to expect."""

    def __init__(self) -> None:
        self._images: Tensor | None = None
        self._logits: Tensor | None = None
        self._version = 0

    def expect(self, images: Tensor | None) -> None:
        """Wait for these images, or for none, and forget the last logits."""
        self._images, self._logits = images, None

    def take(self, images: Tensor) -> Tensor | None:
        """Return the logits of these images, unless there are none or they were written to since."""
        logits = self._logits
        return logits if images is self._images and logits is not None and logits._version == self._version else None

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        # Under DDP the module is also called with the whole batch, as the wrapper of `training_step`. A call without
        # a graph is not the one that the loss comes from.
        if self._images is None or not args or args[0] is not self._images:
            return
        if isinstance(output, Tensor) and output.requires_grad:
            self._logits, self._version = output, output._version
