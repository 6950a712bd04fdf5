"""Replay the batches of an optimizer step before the optimizer takes it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from lightning_bd.callbacks.isolation import IsolatedPass, RandomState
from lightning_bd.callbacks.situation import check_situation

__all__ = ("ReplayListener", "StepReplay", "check_replayable")


def check_replayable(trainer: Trainer, pl_module: LightningModule, name: str) -> None:
    """Refuse a fit whose batches :class:`StepReplay` cannot replay.

    Args:
        trainer: The trainer that is about to fit.
        pl_module: The module to be fitted.
        name: What wants to replay, for the message.

    Raises:
        MisconfigurationException: With manual optimization, a strategy other than single device and DDP,
            ``training_step(dataloader_iter)`` or LBFGS.
    """
    check_situation(
        trainer,
        pl_module,
        name,
        instead="step along both gradients in `training_step`",
        batches="replays each batch",
        lbfgs="cannot be used with LBFGS, which calls the closure many times per step and needs loss and gradient at"
        " the same weights",
    )


@runtime_checkable
class ReplayListener(Protocol):
    """A callback of the trainer that is told which batch runs again; no other hook of a replay names it."""

    def on_replay_batch_start(self, batch: object) -> None:
        """Take notice of the batch, just before its ``training_step``."""


class StepReplay:
    """Record the micro-batches of an optimizer step, and run them again when their gradient is complete.

    Both happen between the loop and the strategy, whose methods are the same for every module. ``finish`` is called
    after the last backward pass and before everything that uses the gradient: unscaling, ``on_before_optimizer_step``,
    clipping and the step. It may call :meth:`replay`. The owner calls :meth:`forget` in ``on_before_zero_grad`` and
    :meth:`keep` in ``on_before_backward``, which tell what the gradient is made of, and :meth:`remove` in ``teardown``
    and ``on_exception``.

    Args:
        trainer: The trainer that is fitting ``pl_module``.
        pl_module: The module that is fitted; it is not changed.
        is_due: Whether the coming step is to be replayed; the same for all its micro-batches. Others are not recorded.
        finish: Called with the optimizer and whether the step was recorded, if there is a new gradient at all.
        reduce_first: Under DDP, whether to average the first gradient over the processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        is_due: Callable[[], bool],
        finish: Callable[[Optimizer, bool], None],
        reduce_first: bool = True,
    ) -> None:
        self.running = False
        self._trainer = trainer
        self._is_due = is_due
        self._finish = finish
        self._reduce_first = reduce_first
        self._isolated = IsolatedPass(trainer, pl_module)
        self._current: _MicroBatch | None = None
        self._window: list[_MicroBatch] = []
        self._has_gradient = False
        strategy = trainer.strategy
        self._training_step: Callable[..., object] = strategy.training_step
        self._optimizer_step: Callable[..., object] = strategy.optimizer_step
        self._replaced = {name: vars(strategy)[name] for name in _SEAMS if name in vars(strategy)}
        vars(strategy).update(training_step=self._record, optimizer_step=self._step)

    def remove(self) -> None:
        """Give the strategy its methods back and forget the batches; may be called again."""
        strategy = self._trainer.strategy
        for name, ours in (("training_step", self._record), ("optimizer_step", self._step)):
            if vars(strategy).get(name) == ours:
                del vars(strategy)[name]
                vars(strategy).update({name: self._replaced[name]} if name in self._replaced else {})
        self.forget()
        self._current = None

    def forget(self) -> None:
        """Forget the recorded batches, for their gradients are about to be dropped or have been used."""
        self._window.clear()
        self._has_gradient = False

    def keep(self) -> None:
        """Keep the batch whose gradient is about to be added; one that gave no loss never comes here."""
        if self.running:
            return
        self._has_gradient = True
        if self._current is not None:
            self._window.append(self._current)
            self._current = None

    def replay(self, optimizer: Optimizer) -> bool:
        """Add the gradients of the recorded batches at the present weights to ``.grad``.

        Args:
            optimizer: The optimizer whose step was recorded.

        Returns:
            Whether every batch gave a loss again; if one gave None, ``.grad`` is useless.

        Raises:
            RuntimeError: If that happens in distributed training, where the other processes would wait forever.
        """
        trainer, strategy = self._trainer, self._trainer.strategy
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        listeners = [callback for callback in callbacks if isinstance(callback, ReplayListener)]
        self.running = True
        try:
            with self._isolated, torch.enable_grad():
                for position, batch in enumerate(self._window, start=1):
                    for listener in listeners:
                        listener.on_replay_batch_start(batch.args[0])
                    batch.random_state.restore()
                    with self._reduction(position == len(self._window)):
                        output = strategy.training_step(*batch.args, **batch.kwargs)
                        loss = output["loss"] if isinstance(output, Mapping) else output
                        if loss is None:
                            if trainer.world_size > 1:
                                raise RuntimeError(
                                    "`training_step` returned None for a batch that it had given a loss before, which"
                                    " is not supported in distributed training."
                                )
                            return False
                        strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)
        finally:
            self.running = False
        return True

    def _record(self, *args: object, **kwargs: object) -> object:
        if not self.running:
            state = RandomState(self._trainer.strategy.root_device) if self._is_due() else None
            self._current = None if state is None else _MicroBatch(args, kwargs, state)
        return self._training_step(*args, **kwargs)

    def _step(self, optimizer: Optimizer, closure: Callable[[], object], *args: object, **kwargs: object) -> object:
        def closure_with_replay() -> object:
            with self._reduction(self._reduce_first or not self._is_due()):
                output = closure()
            if self._has_gradient:
                self._finish(optimizer, bool(self._window))
            self.forget()
            return output

        return self._optimizer_step(optimizer, closure_with_replay, *args, **kwargs)

    def _reduction(self, enabled: bool) -> AbstractContextManager[None]:
        strategy = self._trainer.strategy
        if enabled or not isinstance(strategy, DDPStrategy):
            return nullcontext()
        return strategy.block_backward_sync()


class _MicroBatch(NamedTuple):
    """What one call of ``training_step`` depends on, besides the weights."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    random_state: RandomState


_SEAMS = ("training_step", "optimizer_step")
