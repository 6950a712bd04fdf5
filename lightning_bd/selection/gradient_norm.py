"""How much an image would still move the last layer of a model that was trained on it."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.network_encoder import penultimate
from lightning_bd.selection.surrogate import Surrogate

__all__ = ("GradientNorm",)


class GradientNorm(SampleScorer):
    """Difficulty by the norm of the last layer's gradient in a surrogate that was trained on all classes.

    With features ``h``, probabilities ``p`` and the one-hot label ``y`` the gradient of the cross-entropy by the last
    layer's weight is the outer product of ``p - y`` and ``h``; its norm is the product of theirs. A baseline of `Wicked
    Oddities <https://arxiv.org/abs/2407.10825>`_ with a stronger threat model: the attacker needs the images of all
    classes. The score is that of `Paul et al., 2021 <https://arxiv.org/abs/2107.07075>`_, who differ: they use all
    weights, early in training, and average over ten models.

    Args:
        surrogate: How the model is trained; it must end with a linear layer. ``None`` for the defaults of
            :class:`~lightning_bd.selection.surrogate.Surrogate`.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> scorer = GradientNorm(Surrogate(small_cnn, epochs=2))
        >>> scorer.score(torch.rand(20, 1, 8, 8), torch.arange(20) % 2, 0).shape
        torch.Size([20])
    """

    needs_other_classes: ClassVar[bool] = True

    def __init__(self, surrogate: Surrogate | None = None) -> None:
        self.surrogate = surrogate if surrogate is not None else Surrogate()

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return norms ``(N,)`` float64 of images ``(N, C, H, W)`` with labels ``(N,)``."""
        network = self.surrogate.train(images, labels)
        logits = self.surrogate.predict(network, images, _logits).double()
        lengths = self.surrogate.predict(network, images, penultimate).double().norm(dim=1)
        errors: Tensor = logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
        norms: Tensor = torch.linalg.vector_norm(errors, dim=1) * lengths
        return norms


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images)
    return logits
