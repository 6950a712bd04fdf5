"""Anchoring of the class probabilities of clean samples."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_bd.callbacks.continual.frozen_anchor import AnchoredLossTerm
from lightning_bd.functional.distillation import squared_probability_distance

__all__ = ("Anchoring",)


class Anchoring(AnchoredLossTerm):
    r"""Hold the class probabilities of clean samples where they are at the start of the fit.

    The loss gains :math:`\lambda` times the mean over the batch's clean samples of
    :math:`\lVert \mathrm{softmax} f(x) - \mathrm{softmax} f^*(x) \rVert^2`, with the model :math:`f^*` of the start of
    the fit in evaluation mode. It is the anchoring term of `Flatness-aware Sequential Learning
    <https://arxiv.org/abs/2407.14738>`_, after `Zhang et al., 2022 <https://arxiv.org/abs/2109.01300>`_; differs from
    the latter in that it compares probabilities and not logits. Each process and each accumulated batch takes the mean
    over its own clean samples, and a batch without any adds 0.

    A step costs one forward pass of the anchor. The logits of the model are those that ``training_step`` has computed;
    if it does not call the module on ``batch[0]``, the module is called once more. The penalty is logged as
    ``anchoring/penalty``, its part of loss plus penalty as ``anchoring/share``.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is a plain fit, and nothing is copied or computed.
        clean_only: Whether samples with ``batch.is_poisoned``, which a :class:`~lightning_bd.batch.Sample` has, are
            left out. In a batch without that field all samples are clean.

    Raises:
        ValueError: If ``strength`` is out of range.
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS, a strategy other than single
            device and DDP, or ``find_unused_parameters``; at the first batch, if the batch does not start with a
            tensor of images or the module's ``forward`` does not map it to logits.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Anchoring(strength=2.0)], logger=False)
    """

    log_name: ClassVar[str] = "anchoring"

    def __init__(self, strength: float = 1.0, clean_only: bool = True) -> None:
        super().__init__(strength)
        self.clean_only = clean_only

    def distance(self, logits: Tensor, anchor_logits: Tensor, batch: object) -> Tensor:
        """Return the mean squared distance of the probabilities over the clean samples."""
        distances = squared_probability_distance(logits, anchor_logits)
        is_poisoned: Tensor | None = getattr(batch, "is_poisoned", None) if self.clean_only else None
        if is_poisoned is None:
            return distances.mean()
        # Selecting by a mask would wait for the device to know the shape.
        return torch.where(is_poisoned, 0.0, distances).sum() / (~is_poisoned).sum().clamp(min=1)
