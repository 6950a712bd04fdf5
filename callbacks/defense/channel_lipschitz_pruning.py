"""Channel Lipschitzness-based pruning: silence the channels that can amplify a small change the most."""

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.layers import normalized_convolutions
from lightning_bd.callbacks.defense.outlier_pruning import check_thresholds, is_prunable, prune_outliers
from lightning_bd.functional.channel_statistics import lipschitz_bounds

__all__ = ("ChannelLipschitzPruning",)


class ChannelLipschitzPruning(Defense):
    """Prunes channels whose Lipschitz bound stands out in their layer (``clp``); needs no data.

    `Zheng et al., 2022 <https://arxiv.org/abs/2208.03111>`_: a channel that reacts to a trigger must turn a small
    change of its input into a large one of its output. For each convolution that goes straight into a batch
    normalisation, a channel's bound is the spectral norm of its filter times what the normalisation scales it by (see
    :func:`~lightning_bd.functional.channel_statistics.lipschitz_bounds`); a channel above the layer's mean plus ``u``
    standard deviations is silenced in the normalisation's weight and bias.

    One training image is run through the model, to find out which normalisation follows which convolution; its
    values do not matter. Choosing among several ``u`` is not data-free: it uses the validation images.

    Differs from the paper in: pairs are found by what a forward pass does, not by the order of definition, and layers
    whose weights are frozen are left alone.

    It finds what the paper supposes, triggers that change the image little: on digits 8 pixels wide, a corner made
    brighter by 0.4 was forgotten with ``u=3`` (a setting that was searched for with attack success in view), a white
    one at no ``u`` that kept the accuracy, because a patch of full contrast needs no large Lipschitz constant. Of a
    layer of 10 channels or fewer ``u=3`` can never prune any. The report's note tells how many channels were pruned.

    Use it with ``max_epochs: 0``: it is the whole defense.

    Args:
        u: Standard deviations above the layer's mean, at least 0; usually 3 for ResNet-18 on CIFAR-10. Of
            several the smallest is taken whose clean validation accuracy drops by at most ``max_drop``.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1], where ``u`` is several; 0.01 is one
            point.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> _ = nn.init.ones_(model[0].weight)
        >>> model[0].weight.data[5] = 10.0
        >>> images, labels = torch.rand(2, 1, 3, 3), torch.tensor([0, 1])
        >>> data = DefenderData(lambda epoch: iter([(images, labels)]), lambda: iter([]), num_classes=2)
        >>> ChannelLipschitzPruning().purify(model, data).note
        'pruned 1 of 32 channels'
        >>> model[1].weight[4:7].tolist()
        [1.0, 0.0, 1.0]
    """

    def __init__(self, u: float | Sequence[float] = 3.0, max_drop: float = 0.01) -> None:
        super().__init__()
        self.u = check_thresholds(u, max_drop)
        self.max_drop = max_drop

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Silence the channels of ``model`` whose bound stands out, in place.

        Raises:
            NotApplicableError: If no convolution goes straight into a batch normalisation with running statistics and
                weights that may be changed.
            MisconfigurationException: If there are no training images.
        """
        batch = next(data.train(0), None)
        if batch is None:
            raise MisconfigurationException("The defender has no training images: give the phase a larger split.")
        with data.forward_context():
            pairs = normalized_convolutions(model, batch[0][:1])
        scores: dict[str, tuple[_BatchNorm, Tensor]] = {}
        for name, (convolution, norm) in pairs.items():
            if norm.running_var is not None and is_prunable(norm):
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                scores[name] = (norm, lipschitz_bounds(convolution.weight, scale))
        if not scores:
            raise NotApplicableError(
                "Channel Lipschitzness needs a convolution whose output goes straight into a batch normalisation with "
                "running statistics and a weight and bias that are not frozen; this model has none."
            )
        return prune_outliers(model, data, scores, self.u, self.max_drop)
