"""Learning without forgetting in any automatically optimised LightningModule."""

import math
from typing import ClassVar

from torch import Tensor

from lightning_bd.callbacks.continual.frozen_anchor import AnchoredLossTerm
from lightning_bd.functional.distillation import softened_divergence

__all__ = ("LearningWithoutForgetting",)


class LearningWithoutForgetting(AnchoredLossTerm):
    r"""Distil the model of the start of the fit into the model that learns a new task, on the new task's samples.

    The loss gains :math:`\lambda T^2` times the mean over the batch of
    :math:`\mathrm{KL}(\mathrm{softmax}(f^*(x) / T) \,\|\, \mathrm{softmax}(f(x) / T))`, with the model :math:`f^*` of
    the start of the fit in evaluation mode (`Li and Hoiem, 2017 <https://arxiv.org/abs/1606.09282>`_). Differs from
    the paper in that both tasks share one head, that the old model sees the augmented images, that nothing is warmed
    up, and in the factor :math:`T^2`: the paper's cross-entropy of the same probabilities has :math:`1 / T^2` times
    this gradient, so its :math:`\lambda_o` is ``strength * temperature**2`` here.

    A step costs one forward pass of the old model. The logits of the model are those that ``training_step`` has
    computed; if it does not call the module on ``batch[0]``, the module is called once more. The penalty is logged as
    ``lwf/penalty``, its part of loss plus penalty as ``lwf/share``.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is a plain fit, and nothing is copied or computed. The paper's
            :math:`\lambda_o = 1` is 0.25 here, at its temperature.
        temperature: :math:`T`, positive; 2 in the paper. A higher one minds unlikely classes more.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS, a strategy other than single
            device and DDP, or ``find_unused_parameters``; at the first batch, if the batch does not start with a
            tensor of images or the module's ``forward`` does not map it to logits.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LearningWithoutForgetting(strength=0.25, temperature=2.0)], logger=False)
    """

    log_name: ClassVar[str] = "lwf"

    def __init__(self, strength: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__(strength)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"Expected argument `temperature` to be a positive float, but got {temperature}.")
        self.temperature = float(temperature)

    def distance(self, logits: Tensor, anchor_logits: Tensor, batch: object) -> Tensor:
        """Return the mean divergence of the softened probabilities."""
        return softened_divergence(logits, anchor_logits, self.temperature).mean()
