"""Neural attention distillation: train a backdoored model to look where its fine-tuned copy looks."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.callbacks.defense.base import DefenderData, Defense, Report
from lightning_bd.callbacks.defense.feature_maps import FeatureMaps, find_feature_maps, named_feature_maps
from lightning_bd.callbacks.defense.fine_tuning import FineTuning
from lightning_bd.callbacks.defense.training import Loss, cross_entropy, not_run, training_batches
from lightning_bd.functional.attention import attention_loss

__all__ = ("NeuralAttentionDistillation",)


class NeuralAttentionDistillation(Defense):
    r"""Aligns the attention of the backdoored model with that of a fine-tuned copy of it (``nad``).

    The copy, the teacher, is made first, by :class:`~lightning_bd.callbacks.defense.fine_tuning.FineTuning`, and stays
    as it is. Then the model, the student, is fine-tuned from where it was with

    ``cross-entropy + beta * sum over layers of the mean squared difference of the two attention maps``

    where a map is the sum over channels of :math:`|f|^p`, scaled to norm 1 over space (`Li et al., 2021
    <https://arxiv.org/abs/2101.05930>`_). Both choose their learning rate as
    :class:`~lightning_bd.callbacks.defense.fine_tuning.FineTuning` does: the largest whose clean *validation* accuracy
    drops by at most ``max_drop``.

    The layers are found by one forward pass. In a convolutional network each spatial resolution is a stage; what its
    outermost modules give last, at best the whole stage, is taken of the last ``stages`` of them: ``layer2``,
    ``layer3`` and ``layer4`` of a ResNet-18. Maps of a single position are left out, as they are constantly 1. In a
    vision transformer the attention is over the tokens, after ``stages`` evenly spaced blocks, the last one among them.

    Differs from the released code in what the protocol of `SBL <https://arxiv.org/abs/2407.14738>`_ sets: one ``beta``
    for all layers, SGD without Nesterov's momentum, weight decay 5e-4 (there 1e-4), a cosine schedule (there the rate
    falls in steps from 0.1) and 20 epochs of the teacher (there 5 to 10); and in that the learning rate is chosen.

    Use it with ``max_epochs: 0``: it is the whole defense.

    Args:
        beta: Weight of the attention term, at least 0; SBL: 500; released code: 5000, on the last stage only. 0 is
            plain fine-tuning, and no teacher is made.
        stages: Number of stages to compare, at least 1; fewer if the network has fewer; SBL: 3. Without effect if
            ``layers`` are given.
        layers: Qualified names of the modules to compare instead; their outputs are ``(B, C, H, W)`` or ``(B, N, D)``.
        p: The power in the attention map, at least 1; paper: 2.
        learning_rates: Candidates for teacher and student, each positive; SBL's fine-tuning: 0.01; released code: 0.1.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1]; 0.01 is one point.
        max_epochs: Epochs of the student per candidate; SBL and the released code: 20. The run's cap applies.
        teacher_epochs: Epochs of the teacher per candidate; SBL: 20. The run's cap applies.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, at least 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from lightning_bd.backbones import resnet20
        >>> batches = [(torch.rand(8, 1, 8, 8), torch.arange(8))]
        >>> data = DefenderData(lambda epoch: iter(batches), lambda: iter(batches), num_classes=10)
        >>> defense = NeuralAttentionDistillation(learning_rates=[0.01], max_epochs=1, teacher_epochs=1)
        >>> defense.purify(resnet20(10, in_channels=1), data).note
        'lr 0.01, teacher lr 0.01, maps of layer1, layer2, layer3'
    """

    def __init__(
        self,
        beta: float = 500.0,
        stages: int = 3,
        layers: Sequence[str] | None = None,
        p: float = 2.0,
        learning_rates: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
        max_drop: float = 0.01,
        max_epochs: int = 20,
        teacher_epochs: int = 20,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"Expected argument `beta` to be a non-negative float, but got {beta}.")
        if stages < 1:
            raise ValueError(f"Expected argument `stages` to be a positive integer, but got {stages}.")
        if layers is not None and (isinstance(layers, str) or not layers or len(set(layers)) < len(layers)):
            raise ValueError(f"Expected argument `layers` to be distinct names or None, but got {layers!r}.")
        if not 1 <= p < math.inf:
            raise ValueError(f"Expected argument `p` to be a finite number of at least 1, but got {p}.")
        if teacher_epochs < 1:
            raise ValueError(f"Expected argument `teacher_epochs` to be a positive integer, but got {teacher_epochs}.")
        self.beta = beta
        # `stages` is a method of every defense.
        self.num_stages = stages
        self.layers = None if layers is None else tuple(layers)
        self.p = p
        self._student = FineTuning(learning_rates, max_drop, max_epochs, momentum, weight_decay)
        self._teacher = FineTuning(learning_rates, max_drop, teacher_epochs, momentum, weight_decay)

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Fine-tune a copy of ``model``, then ``model`` itself towards the copy's attention.

        Raises:
            NotApplicableError: If there are no maps to compare, or every parameter is frozen.
            MisconfigurationException: If the model has no module of a name in ``layers``, or there are no
                training images.
        """
        if self.beta == 0:
            return self._student.fine_tune(model, data, cross_entropy, "distillation")
        images = next(training_batches(data, 0))[0][:2]
        with data.forward_context():
            if self.layers is None:
                maps = find_feature_maps(model, images, self.num_stages)
            else:
                maps = named_feature_maps(model, images, self.layers)
        if skipped := not_run(data):
            return skipped
        teacher = copy.deepcopy(model)
        taught = self._teacher.fine_tune(teacher, data, cross_entropy, "teacher")
        teacher.requires_grad_(False).eval()
        report = self._student.fine_tune(model, data, self._loss(teacher, maps), "distillation")
        report.note += f", teacher {taught.note}, maps of {', '.join(maps.layers)}"
        report.values["teacher_learning_rate"] = taught.values["learning_rate"]
        report.values["teacher_validation_accuracy"] = taught.values["validation_accuracy"]
        return report

    def _loss(self, teacher: nn.Module, maps: FeatureMaps) -> Loss:
        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                _, targets = maps.read(teacher, images)
            logits, features = maps.read(model, images)
            return F.cross_entropy(logits, labels) + self.beta * attention_loss(features, targets, self.p)

        return loss
