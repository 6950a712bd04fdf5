"""The base of attacks that train their trigger together with the model."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_bd.attacks.generator_training import GeneratorTraining
from lightning_bd.batch import AttackBatch
from lightning_bd.callbacks.situation import check_situation
from lightning_bd.checkpointing import TRIGGER_KEY
from lightning_bd.classifier import BackdoorClassifier, Normalization
from lightning_bd.datamodules import DefenderView, ImageDataModule
from lightning_bd.triggers.network import NetworkTrigger

__all__ = ("GeneratorAttack",)

TriggerT = TypeVar("TriggerT", bound=NetworkTrigger)


class GeneratorAttack(BackdoorClassifier, Generic[TriggerT]):
    """A classifier whose attacker trains the trigger with it, in the phases that are poisoned.

    The trigger is the one of the data, ``data.poison.trigger``, for everybody who measures or defends; only its weights
    are learnt here. It is no part of the model, so that a defense neither sees nor prunes it. In other phases this is a
    :class:`~lightning_bd.classifier.BackdoorClassifier`.

    A subclass says what class the trigger is of, and implements :meth:`attack_loss`; one backward pass of that loss
    gives the gradients of both. The model's optimizer is the phase's, the trigger's is Adam.

    Args:
        backbone: Any module that maps images ``(B, C, H, W)`` in [0, 1] (after ``normalize``) to logits ``(B, K)``.
        num_classes: Number of classes ``K``.
        generator_lr: Learning rate of the trigger's Adam, positive.
        generator_betas: Its decays.
        optimizer: See :class:`~lightning_bd.classifier.BackdoorClassifier`, as for the rest.
        lr_scheduler: Schedule of the model's optimizer; the trigger's rate is constant.
        criterion: Loss of logits and labels.
        normalize: Mean and standard deviation per channel.
        channels_last: Use the channels-last memory format.
        compile: Compile the backbone.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When a fit starts, without such a trigger, with a static poison, with 16-bit mixed
            precision, manual optimization, LBFGS, or a strategy other than single device and DDP.
    """

    #: Class of the trigger.
    trigger_class: ClassVar[type[NetworkTrigger]]

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        generator_lr: float,
        generator_betas: tuple[float, float] = (0.9, 0.999),
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lr_scheduler: LRSchedulerCallable | None = None,
        criterion: nn.Module | None = None,
        normalize: Normalization | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, optimizer, lr_scheduler, criterion, normalize, channels_last, compile
        )  # fmt: skip
        if not generator_lr > 0:
            raise ValueError(f"Expected argument `generator_lr` to be a positive float, but got {generator_lr}.")
        if len(generator_betas) != 2 or not all(0 <= beta < 1 for beta in generator_betas):
            raise ValueError(
                f"Expected argument `generator_betas` to be two floats in [0, 1), but got {generator_betas}."
            )
        self.generator_lr = generator_lr
        self.generator_betas = generator_betas

    @abstractmethod
    def attack_loss(self, batch: AttackBatch) -> Tensor:
        """Return the loss of model and trigger.

        Args:
            batch: The batch; the trigger is to be put on its clean images.
        """

    def trained_parameters(self, trigger: TriggerT) -> list[nn.Parameter]:
        """Return the parameters that are trained beside the model's: all of the trigger's.

        Args:
            trigger: The trigger, of ``trigger_class``.
        """
        return list(trigger.parameters())

    def trains_trigger(self, epoch: int) -> bool:
        """Return whether the trigger is trained in an epoch of the phase; always, here.

        Args:
            epoch: The epoch, from 0.
        """
        return True

    def prepare_trigger(self, trigger: TriggerT) -> None:
        """Change the trigger before a phase begins to train, unless the phase is resumed; nothing, here.

        Args:
            trigger: The trigger, of ``trigger_class``.
        """

    def generator_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of some of the trigger's parameters.

        Args:
            parameters: The parameters.
        """
        return torch.optim.Adam(parameters, lr=self.generator_lr, betas=self.generator_betas)

    @property
    def trigger(self) -> TriggerT:
        """The trigger of the data, of ``trigger_class``; known while a Trainer with that data is attached."""
        trigger: TriggerT = self.trainer.datamodule.poison.trigger  # type: ignore[attr-defined]
        return trigger

    def setup(self, stage: str) -> None:
        """Refuse data that the attack cannot poison, before anything is trained."""
        super().setup(stage)
        if stage == "fit":
            self.check_fit()

    def configure_callbacks(self) -> list[Callback]:
        """Add what trains the trigger, where the phase is poisoned."""
        return [GeneratorTraining()] if self._is_attacking else []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch, with gradients for the trigger where the phase is poisoned."""
        if not isinstance(batch, AttackBatch):
            return super().training_step(batch, batch_idx)
        with torch.inference_mode(False):
            self.trigger.to(self.device)
        loss = self.attack_loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.label))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the trigger's weights as they are."""
        super().on_save_checkpoint(checkpoint)
        if self._is_attacking:
            state = self.trigger.state_dict()
            checkpoint[TRIGGER_KEY] = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the trigger's weights, where there is data with such a trigger."""
        super().on_load_checkpoint(checkpoint)
        trainer = self._trainer
        poison = getattr(getattr(trainer, "datamodule", None), "poison", None)
        if TRIGGER_KEY in checkpoint and poison is not None and isinstance(poison.trigger, self.trigger_class):
            poison.trigger.restore(trainer.datamodule.image_shape, checkpoint[TRIGGER_KEY])  # type: ignore[union-attr]

    def check_fit(self) -> None:
        """Check that the Trainer's fit is one that this attack can train in.

        Raises:
            MisconfigurationException: With the fix.
        """
        name, wanted = type(self).__name__, self.trigger_class.__name__
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DefenderView):
            return
        fix = f"Set `data.poison.trigger` to `{{class_path: lightning_bd.triggers.{wanted}}}`"
        if not isinstance(data, ImageDataModule):
            raise MisconfigurationException(
                f"`{name}` trains the trigger of its data, so it needs one of lightning_bd.datamodules and not only "
                f"loaders. {fix}, or train a BackdoorClassifier."
            )
        if data.phase.poison is None and data.poison is not None:
            return
        if data.poison is None or not isinstance(data.poison.trigger, self.trigger_class):
            found = "no poison" if data.poison is None else f"a `{type(data.poison.trigger).__name__}`"
            raise MisconfigurationException(f"`{name}` trains a `{wanted}`, but the data has {found}. {fix}.")
        if data.phase.poison != "dynamic":
            raise MisconfigurationException(
                f"`{name}` changes its trigger at each step, which images that are poisoned once cannot follow. Set "
                "`data.poison.mode` and the phase's `poisoned` to `dynamic`."
            )
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"`{name}` steps along gradients that the scaler of 16-bit mixed precision has not unscaled. Use "
                "`trainer.precision: bf16-mixed` or `32-true`."
            )
        check_situation(
            self.trainer,
            self,
            name,
            instead="use a trigger that is not trained",
            lbfgs="steps the trigger once per step, and LBFGS evaluates several times",
        )

    @property
    def _is_attacking(self) -> bool:
        data = getattr(self._trainer, "datamodule", None)
        return (
            isinstance(data, ImageDataModule)
            and data.poison is not None
            and data.phase.poison == "dynamic"
            and isinstance(data.poison.trigger, self.trigger_class)
        )
