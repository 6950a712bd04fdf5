"""Training without moving BatchNorm's running statistics."""

from contextlib import ExitStack

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.functional.batch_norm import frozen_running_stats

__all__ = ("FrozenRunningStatistics",)


class FrozenRunningStatistics(Callback):
    """Leave the running mean and variance of all BatchNorm layers as they are while the model is trained.

    Training batches are normalised with their own statistics, as ever; validation, tests and the trained model use the
    running statistics from before the fit. The code of `Flatness-aware Sequential Learning
    <https://arxiv.org/abs/2407.14738>`_ trains its second step so, for its SAM leaves all momenta at 0: this callback,
    beside :class:`~lightning_bd.callbacks.ElasticWeightConsolidation`, reproduces that.

    The layers' settings are put back when training ends, also after an exception, and a checkpoint holds no trace of
    them: a fit that goes on without this callback moves the statistics again.

    Raises:
        MisconfigurationException: When training starts, if the module has no BatchNorm layer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FrozenRunningStatistics()], logger=False)
    """

    def __init__(self) -> None:
        self._frozen = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the statistics; by now ``sync_batchnorm`` has exchanged the layers."""
        if not any(isinstance(layer, _BatchNorm) for layer in pl_module.modules()):
            raise MisconfigurationException(
                f"`{type(self).__name__}` found no BatchNorm layer in `{type(pl_module).__name__}`. Remove the"
                " callback."
            )
        self._frozen.enter_context(frozen_running_stats(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the settings back, before ``sync_batchnorm`` exchanges the layers again."""
        self._frozen.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the settings back."""
        self._frozen.close()
