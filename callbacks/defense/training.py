"""What defenses share that train on, or measure with, the defender's clean data."""

from collections.abc import Callable, Iterator

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from lightning_bd.callbacks.defense.base import DefenderData, Report
from lightning_bd.callbacks.isolation import RandomState
from lightning_bd.functional.draws import keyed_seed
from lightning_bd.functional.modes import mode

__all__ = ("Loss", "allowed_epochs", "clean_accuracy", "cross_entropy", "not_run", "train", "training_batches")

#: Loss of a model on images ``(B, C, H, W)`` and labels ``(B,)``: a tensor without dimensions.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``model``'s logits, a tensor without dimensions.

    Args:
        model: Maps images to logits.
        images: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)`` int64.
    """
    return F.cross_entropy(model(images), labels)


def allowed_epochs(data: DefenderData, wanted: int) -> int:
    """Return ``wanted`` epochs, or fewer if the run caps them."""
    return wanted if data.epoch_limit is None else min(wanted, data.epoch_limit)


def not_run(data: DefenderData) -> Report | None:
    """Return the report of a defense that needs epochs, if the run allows none; else ``None``."""
    return Report(note="not run: the run's cap on epochs is 0") if data.epoch_limit == 0 else None


def training_batches(data: DefenderData, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's ``(image, label)`` batches to train on.

    A batch of one image that comes after a larger one, what remains at the end of an epoch, is left out: batch
    normalisation has no statistics of a single value.

    Args:
        data: The defender's data.
        epoch: Number of the epoch.

    Raises:
        MisconfigurationException: If there are no training images.
    """
    largest = 0
    for images, labels in data.train(epoch):
        if len(images) != 1 or largest <= 1:
            yield images, labels
        largest = max(largest, len(images))
    if not largest:
        raise MisconfigurationException("The defender has no training images: give the phase a larger split.")


def train(
    model: nn.Module,
    data: DefenderData,
    epochs: int,
    optimizer: Optimizer,
    loss: Loss = cross_entropy,
    *,
    schedule: LRScheduler | None = None,
    step: Callable[[Callable[[], Tensor]], None] | None = None,
    first_epoch: int = 0,
    title: str = "training",
) -> None:
    """Train a model in place on the defender's training images, in training mode.

    A batch normalisation whose parameters are all frozen stays in evaluation mode, so that it keeps its running
    statistics. A batch of one image after larger ones is left out. What a pass draws, such as dropout masks, is keyed
    by the number of the epoch: the random streams of torch are seeded for each epoch, and all streams are put back at
    the end. Gradients are dropped at the end. All this also after an exception.

    Args:
        model: The model; every module's mode is put back.
        data: The defender's data.
        epochs: Number of epochs.
        optimizer: Steps after each batch.
        loss: What to minimise.
        schedule: Steps after each epoch.
        step: Instead of one backward pass and one step of the optimizer: gets a function that computes the batch's
            loss and its gradient, and may call it more than once.
        first_epoch: Number of the first epoch; decides order and augmentation.
        title: For the progress bar.

    Raises:
        MisconfigurationException: If there are no training images.
    """
    random_state = RandomState(optimizer.param_groups[0]["params"][0].device)
    try:
        with mode(model, training=True):
            _freeze_normalizations(model)
            progress = range(first_epoch, first_epoch + epochs)
            for epoch in tqdm(progress, title, disable=not data.show_progress, leave=False):
                # Of nothing but the epoch: a candidate draws the same alone and after one that was rejected.
                random_state.seed(keyed_seed(0, "defense training", epoch))
                for images, labels in training_batches(data, epoch):

                    def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                        optimizer.zero_grad(set_to_none=True)
                        with data.forward_context():
                            value = loss(model, images, labels)
                        value.backward()  # type: ignore[no-untyped-call]
                        return value

                    if step is None:
                        closure()
                        optimizer.step()
                    else:
                        step(closure)
                if schedule is not None:
                    schedule.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
        random_state.restore()


def _freeze_normalizations(model: nn.Module) -> None:
    """Put the batch normalisations that the user froze into evaluation mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


@torch.no_grad()
def clean_accuracy(model: nn.Module, data: DefenderData) -> float:
    """Return the accuracy on the defender's validation images, in [0, 1], in evaluation mode.

    Args:
        model: Maps images to logits; every module's mode is put back.
        data: The defender's data.

    Raises:
        MisconfigurationException: If there are no validation images.
    """
    correct = total = 0
    with mode(model, training=False):
        for images, labels in data.validation():
            with data.forward_context():
                logits = model(images)
            correct += int((logits.argmax(1) == labels).sum())
            total += len(labels)
    if total == 0:
        raise MisconfigurationException("The defender has no validation images: give the phase a larger split.")
    return correct / total
