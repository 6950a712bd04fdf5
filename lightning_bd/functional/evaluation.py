"""Loss and accuracy of a network, and whether its weights are finite."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.functional.modes import mode

__all__ = ("Evaluation", "check_finite_weights", "evaluate")


class Evaluation(NamedTuple):
    """Mean cross-entropy of some images towards their labels, and the share that is predicted so, in [0, 1]."""

    loss: float
    accuracy: float


def check_finite_weights(model: nn.Module, name: str = "The model") -> None:
    """Refuse a network that has weights or running statistics that are not finite.

    Args:
        model: Any module.
        name: How the message calls it, such as the path that it was read from.

    Raises:
        ValueError: If a parameter, or the running mean or variance of a layer, holds NaN or infinity.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.constant_(model.bias, float("nan"))
        >>> check_finite_weights(model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: The model has weights that are not finite: `bias`; training has diverged, ...
    """
    # Other buffers may hold infinity by design, such as the masks of attention.
    running = [(key, b) for key, b in model.named_buffers() if key.endswith(("running_mean", "running_var"))]
    broken = [key for key, tensor in (*model.named_parameters(), *running) if not bool(tensor.isfinite().all())]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{name} has weights that are not finite: {', '.join(f'`{key}`' for key in broken[:3])}{more}; training"
            " has diverged, so use an earlier checkpoint, or train again with a smaller learning rate."
        )


def evaluate(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> Evaluation:
    """Measure the mean cross-entropy and the accuracy of a classifier, in evaluation mode.

    With triggered images and the attacker's labels in place of the true ones, leaving out images whose true label is
    the attacker's, the two are the poisoned loss and the attack success rate. Every image counts the same, whatever
    the sizes of the batches. Logits with a NaN are a wrong prediction, for their maximum would be the first NaN and a
    network that overflows would succeed in every attack on class 0. Modes are put back, after an exception too.

    Args:
        model: Maps images ``(B, ...)`` to logits ``(B, K)``.
        batches: Batches on the model's device; ``batch[0]`` are the images, ``batch[1]`` the labels ``(B,)``, int64.

    Returns:
        The loss, which is NaN or infinite if the logits overflow, and the accuracy in [0, 1].

    Raises:
        ValueError: If there is no image.

    Example:
        >>> images, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), torch.tensor([0, 1, 1])
        >>> loss, accuracy = evaluate(nn.Identity(), [(images, labels)])
        >>> round(loss, 4), round(accuracy, 4)
        (0.7936, 0.6667)
    """
    losses, matches, count = [], [], 0
    with mode(model, training=False), torch.no_grad():
        for batch in batches:
            images, labels = batch[0], batch[1]
            logits = _in_full_precision(model(images))
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            matches.append(((logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)).sum())
            count += len(labels)
    if count == 0:
        raise ValueError("Expected argument `batches` to hold at least one image, but got none.")
    # Added up away from the device: nothing waits for it before, and some have no float64.
    loss = torch.stack(losses).cpu().double().sum() / count
    return Evaluation(loss.item(), torch.stack(matches).sum().item() / count)


def _in_full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()
