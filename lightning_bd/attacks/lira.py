"""LIRA: a classifier and the network that makes its trigger, trained together."""

from typing import ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_bd.attacks.base import GeneratorAttack
from lightning_bd.batch import AttackBatch
from lightning_bd.classifier import Normalization
from lightning_bd.triggers.lira import LIRATrigger
from lightning_bd.triggers.network import NetworkTrigger

__all__ = ("LIRA",)


class LIRA(GeneratorAttack[LIRATrigger]):
    r"""Train a classifier and the faint noise that it answers to, each against the other as it is.

    The attack of `Doan et al., 2021
    <https://openaccess.thecvf.com/content/ICCV2021/html/Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html>`_
    with :class:`~lightning_bd.triggers.LIRATrigger`. The loss is :math:`\alpha` times that of the clean images of a
    batch plus :math:`1 - \alpha` times that of its triggered images; the trigger's network follows the second part. In
    the first ``generator_epochs`` epochs of a phase, the paper's first stage, both are trained; then the trigger stays
    and the classifier is fine-tuned, the second stage.

    Differs from the paper: each image of a batch is triggered with the poison's ``rate`` (0.5 for the same share of
    both) instead of being in it twice, and classifier and trigger take their steps from the same gradient instead of in
    turns. In the released code the classifier sees the trigger of the epoch before; here that of the step before.

    Args:
        backbone: Any module that maps images ``(B, C, H, W)`` in [0, 1] (after ``normalize``) to logits ``(B, K)``.
        num_classes: Number of classes ``K``.
        alpha: Weight of the clean images, in [0, 1); 0.5 in the paper.
        generator_epochs: Epochs of the first stage; ``None``: all, so that there is no second.
        training_strength: Strength of the noise in the first stage, in (0, 1]; ``None``: the trigger's own. The
            released recipes learn at 0.1 and attack at 0.01.
        generator_lr: Learning rate of the trigger's Adam; 1e-4 in the released code.
        generator_betas: Its decays.
        optimizer: Makes the model's optimizer; a phase may bring its own.
        lr_scheduler: Makes its schedule.
        criterion: Loss of logits and labels; cross-entropy by default.
        normalize: Mean and standard deviation per channel.
        channels_last: Use the channels-last memory format.
        compile: Compile the backbone.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When a fit starts; see :class:`~lightning_bd.attacks.base.GeneratorAttack`.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> model = LIRA(small_cnn(num_classes=10, in_channels=1), num_classes=10, generator_epochs=50)
        >>> model.trains_trigger(49), model.trains_trigger(50)
        (True, False)
    """

    trigger_class: ClassVar[type[NetworkTrigger]] = LIRATrigger

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        alpha: float = 0.5,
        generator_epochs: int | None = None,
        training_strength: float | None = None,
        generator_lr: float = 1e-4,
        generator_betas: tuple[float, float] = (0.9, 0.999),
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lr_scheduler: LRSchedulerCallable | None = None,
        criterion: nn.Module | None = None,
        normalize: Normalization | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, generator_lr, generator_betas, optimizer, lr_scheduler, criterion, normalize,
            channels_last, compile,
        )  # fmt: skip
        if not 0 <= alpha < 1:
            raise ValueError(f"Expected argument `alpha` to be a float in [0, 1), but got {alpha}.")
        if generator_epochs is not None and generator_epochs < 0:
            raise ValueError(
                f"Expected argument `generator_epochs` to be a non-negative integer, but got {generator_epochs}."
            )
        if training_strength is not None and not 0 < training_strength <= 1:
            raise ValueError(
                f"Expected argument `training_strength` to be a float in (0, 1], but got {training_strength}."
            )
        self.alpha = alpha
        self.generator_epochs = generator_epochs
        self.training_strength = training_strength

    def trains_trigger(self, epoch: int) -> bool:
        """Return whether an epoch, counted from 0, belongs to the first stage."""
        return self.generator_epochs is None or epoch < self.generator_epochs

    def attack_loss(self, batch: AttackBatch) -> Tensor:
        """Return the weighted loss of the clean and the triggered images of a batch."""
        rows, images = batch.poison_rows, batch.clean_image
        # An argsort and no mask: the size of what a mask selects would have to be asked from the device.
        is_triggered = torch.zeros_like(batch.label).index_fill_(0, rows, 1)
        others = is_triggered.argsort(stable=True)[: len(images) - len(rows)]
        logits = self(images.index_copy(0, rows, self._triggered(images[rows])))
        parts = [
            weight * self.criterion(logits[part], batch.label[part])
            for weight, part in ((self.alpha, others), (1 - self.alpha, rows))
            if len(part) > 0
        ]
        return torch.stack(parts).sum()

    def _triggered(self, images: Tensor) -> Tensor:
        if len(images) == 0:
            return images
        if not self.trains_trigger(self.current_epoch):
            with torch.no_grad():
                triggered: Tensor = self.trigger(images)
            return triggered
        if self.training_strength is None:
            return self.trigger(images)  # type: ignore[no-any-return]
        noise = self.training_strength * self.trigger.noise(images)
        return torch.clamp(images + noise, 0, 1).to(images.dtype)
