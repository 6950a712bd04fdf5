"""How often a model learns an image and forgets it again."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.surrogate import Surrogate

__all__ = ("ForgettingEvents",)


class ForgettingEvents(SampleScorer):
    """Difficulty by the forgetting events in the training of a surrogate on all classes.

    An event is an image that was predicted rightly when it was last seen in training, and now is not (`Toneva et al.,
    2019 <https://arxiv.org/abs/1812.05159>`_). An image that is never predicted rightly counts as many as there are
    epochs, which no other reaches. A baseline of `Wicked Oddities <https://arxiv.org/abs/2407.10825>`_ with a stronger
    threat model: the attacker needs the images of all classes. Many images share a count; the selection decides between
    them by a hash.

    Args:
        surrogate: How the model is trained, for at least 2 epochs; ``None`` for the defaults of
            :class:`~lightning_bd.selection.surrogate.Surrogate`. The paper's are 200 epochs.

    Raises:
        ValueError: If there are fewer than 2 epochs, in which nothing can be forgotten.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> scorer = ForgettingEvents(Surrogate(small_cnn, epochs=3))
        >>> scores = scorer.score(torch.rand(20, 1, 8, 8), torch.arange(20) % 2, 0)
        >>> bool(((scores >= 0) & (scores <= 3)).all())
        True
    """

    needs_other_classes: ClassVar[bool] = True

    def __init__(self, surrogate: Surrogate | None = None) -> None:
        self.surrogate = surrogate if surrogate is not None else Surrogate()
        if self.surrogate.epochs < 2:
            raise ValueError(
                f"Expected argument `surrogate` to train for at least 2 epochs, but got {self.surrogate.epochs}."
            )

    @torch.inference_mode(False)
    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return counts ``(N,)`` float64 of images ``(N, C, H, W)`` with labels ``(N,)``."""
        events = torch.zeros(len(labels), dtype=torch.float64)
        known = torch.zeros(len(labels), dtype=torch.bool)
        ever = torch.zeros(len(labels), dtype=torch.bool)

        def note(rows: Tensor, logits: Tensor) -> None:
            right = logits.argmax(dim=1) == labels[rows]
            events[rows] += (known[rows] & ~right).double()
            known[rows] = right
            ever[rows] |= right

        self.surrogate.train(images, labels, note)
        return events.masked_fill(~ever, self.surrogate.epochs)
