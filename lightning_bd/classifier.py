"""The LightningModule that wraps any backbone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_bd.batch import Sample
from lightning_bd.metrics import AttackSuccessRate, RobustAccuracy

__all__ = ("BackdoorClassifier", "Normalization")


@dataclass
class Normalization:
    """Per-channel mean and standard deviation of images in [0, 1].

    Args:
        mean: One value per channel.
        std: One positive value per channel.

    Raises:
        ValueError: If the lengths differ or a deviation is not positive.
    """

    mean: list[float]
    std: list[float]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(
                "Expected `mean` and `std` to be equally long and `std` positive, "
                f"but got mean {self.mean} and std {self.std}."
            )


class _Normalize(nn.Module):
    """The model's first layer; its numbers are the config's, not the checkpoint's."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Normalization) -> None:
        super().__init__()
        self.statistics = statistics
        self.register_buffer("mean", torch.tensor(statistics.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class BackdoorClassifier(LightningModule):
    """Trains and evaluates a backbone on batches that may be poisoned.

    Training uses ``batch[:2]`` only, so plain ``(image, label)`` pairs work as well. Evaluation of
    :class:`~lightning_bd.batch.Sample` batches logs ``{split}/clean_accuracy`` over the clean images, and over the
    triggered ones ``{split}/attack_success_rate`` (images of the attacker's own class excluded) and
    ``{split}/robust_accuracy`` (predicted as the original label).

    Args:
        backbone: Any module that maps images ``(B, C, H, W)`` in [0, 1] (after ``normalize``) to logits ``(B, K)``.
        num_classes: Number of classes ``K``.
        optimizer: Makes the optimizer from the parameters; a phase may bring its own. The papers use SGD with
            lr 0.01 and momentum 0.9.
        lr_scheduler: Makes the scheduler from the optimizer, stepped once per epoch.
        criterion: Loss of logits and labels; cross-entropy by default.
        normalize: Mean and standard deviation per channel, applied as the first layer; ``None`` leaves [0, 1].
        channels_last: Use the channels-last memory format, faster for convolutions on most devices.
        compile: Compile the backbone with ``torch.compile``.

    Raises:
        ValueError: If ``num_classes`` is not positive.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> model = BackdoorClassifier(small_cnn(num_classes=10, in_channels=1), num_classes=10)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lr_scheduler: LRSchedulerCallable | None = None,
        criterion: nn.Module | None = None,
        normalize: Normalization | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"Expected argument `num_classes` to be a positive integer, but got {num_classes}.")
        self.num_classes = num_classes
        self.normalize = nn.Identity() if normalize is None else _Normalize(normalize)
        self.backbone = backbone
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.channels_last = channels_last
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        if compile:
            self.backbone.compile()
        self.val_metrics = self._metrics("val/")
        self.test_metrics = self._metrics("test/")

    def setup(self, stage: str) -> None:
        """Refuse pairs where the attack is to be measured, before anything is trained."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if getattr(datamodule, "batch_format", None) == "pair" and getattr(datamodule, "poison", None) is not None:
            raise MisconfigurationException(
                "`BackdoorClassifier` measures attack success with the original labels, which pairs do not have: set "
                "`data.batch_format: sample`."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of images ``(B, C, H, W)`` in [0, 1]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.backbone(self.normalize(images))
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch and log it as ``train/loss``."""
        images, labels = batch[:2]
        loss: Tensor = self.criterion(self(images), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the validation metrics."""
        self._update(self.val_metrics, batch, dataloader_idx)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the test metrics."""
        self._update(self.test_metrics, batch, dataloader_idx)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> tuple[Tensor, ...]:
        """Return probabilities ``(B, K)``, labels ``(B,)`` and, of samples, their indices ``(B,)``."""
        probabilities = self(batch[0]).softmax(dim=1)
        return (probabilities, batch[1], batch.index) if isinstance(batch, Sample) else (probabilities, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log(self.test_metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and, if there is one, the scheduler."""
        optimizer = self.optimizer_factory(self.parameters())
        if self.lr_scheduler_factory is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler_factory(optimizer)}

    def _metrics(self, prefix: str) -> MetricCollection:
        return MetricCollection(
            {
                "clean_accuracy": MulticlassAccuracy(self.num_classes, average="micro", validate_args=False),
                "attack_success_rate": AttackSuccessRate(),
                "robust_accuracy": RobustAccuracy(),
            },
            prefix=prefix,
            compute_groups=False,
        )

    def _update(self, metrics: MetricCollection, batch: Sequence[Tensor], dataloader_idx: int) -> None:
        logits = self(batch[0])
        # The first loader is clean, the second triggered; to look at the flags would wait for the device.
        if dataloader_idx > 0 and isinstance(batch, Sample):
            metrics["attack_success_rate"].update(logits, batch.label, batch.original_label)
            metrics["robust_accuracy"].update(logits, batch.label, batch.original_label)
        else:
            metrics["clean_accuracy"].update(logits, batch[1])

    def _log(self, metrics: MetricCollection) -> None:
        updated = {name: metric for name, metric in metrics.items() if metric.update_called}
        # `compute` has combined the processes already; Lightning warns unless it may do so again.
        self.log_dict({name: metric.compute() for name, metric in updated.items()}, prog_bar=True, sync_dist=True)
        for metric in updated.values():
            metric.reset()
