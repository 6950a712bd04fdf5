"""How badly a model that was trained on an image still does on it."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.surrogate import Surrogate

__all__ = ("LossScore",)


class LossScore(SampleScorer):
    """Difficulty by the loss of a surrogate that was trained on all classes.

    The cross-entropy of each image after training, in evaluation mode. A baseline of `Wicked Oddities
    <https://arxiv.org/abs/2407.10825>`_ with a stronger threat model: the attacker needs the images of all classes.

    Args:
        surrogate: How the model is trained; ``None`` for the defaults of
            :class:`~lightning_bd.selection.surrogate.Surrogate`.

    Example:
        >>> import torch
        >>> from lightning_bd.backbones import small_cnn
        >>> scorer = LossScore(Surrogate(small_cnn, epochs=2))
        >>> scorer.score(torch.rand(20, 1, 8, 8), torch.arange(20) % 2, 0).shape
        torch.Size([20])
    """

    needs_other_classes: ClassVar[bool] = True

    def __init__(self, surrogate: Surrogate | None = None) -> None:
        self.surrogate = surrogate if surrogate is not None else Surrogate()

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return losses ``(N,)`` float64 of images ``(N, C, H, W)`` with labels ``(N,)``."""
        network = self.surrogate.train(images, labels)
        logits = self.surrogate.predict(network, images, _logits)
        return F.cross_entropy(logits.double(), labels, reduction="none")


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images)
    return logits
