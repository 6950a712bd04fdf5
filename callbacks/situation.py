"""What a callback that works on gradients cannot be used with, refused with the fix."""

import inspect

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.optim import LBFGS

__all__ = ("check_situation",)

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)
_DERIVED_BUT_DIFFERENT = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def check_situation(
    trainer: Trainer,
    pl_module: LightningModule,
    name: str,
    *,
    instead: str,
    lbfgs: str,
    needs: str = "whole weights",
    batches: str | None = None,
) -> None:
    """Refuse a fit with manual optimization, a strategy other than single device and DDP, or LBFGS.

    Args:
        trainer: The trainer that is about to fit.
        pl_module: The module to be fitted.
        name: What cannot be used, for the message.
        instead: What a module with manual optimization can do instead.
        lbfgs: Why LBFGS cannot be used.
        needs: What has to be on every device.
        batches: What the callback does with each batch, if ``training_step(dataloader_iter)`` cannot be used.

    Raises:
        MisconfigurationException: With the fix.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"`{name}` needs automatic optimization, but `{type(pl_module).__name__}` sets"
            f" `automatic_optimization = False`. Remove that line, or {instead}."
        )
    strategy = trainer.strategy
    if not isinstance(strategy, _STRATEGIES) or isinstance(strategy, _DERIVED_BUT_DIFFERENT):
        raise MisconfigurationException(
            f"`{name}` needs {needs} on every device and does not support `{type(strategy).__name__}`."
            ' Use `Trainer(devices=1)` or `Trainer(strategy="ddp")`.'
        )
    if batches is not None and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"`{name}` {batches}, but `training_step(dataloader_iter)` draws it itself."
            " Use `training_step(batch, batch_idx)`."
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(f"`{name}` {lbfgs}. Use another optimizer, for example SGD or AdamW.")
