"""Batch-norm pruning: silence the channels whose statistics on clean data differ from the stored ones."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.outlier_pruning import (
    check_thresholds,
    is_prunable,
    prune_outliers,
    watch_inputs,
)
from lightning_bd.functional.channel_statistics import ChannelMoments, gaussian_kl_divergence

__all__ = ("BatchNormPruning",)


class BatchNormPruning(Defense):
    """Prunes channels whose clean statistics differ from a batch normalisation's running ones (``bnp``).

    `Zheng et al., 2022 <https://openreview.net/forum?id=wwW-1k1ljIg>`_: the running mean and variance were collected
    on poisoned data, and a channel that reacts to the trigger had other moments there than it has on clean data. For
    each channel the Kullback-Leibler divergence of the normal distribution with the clean moments from the one with
    the running moments is taken, D(clean || running); a channel above the layer's mean plus ``u`` standard
    deviations is silenced in the normalisation's weight and bias.

    The clean moments are those of the normalisation's input in evaluation mode, over all images and positions of one
    epoch of the defender's training data. The running statistics are not changed. They must come from poisoned data:
    whoever trained the model on clean data last, as sequential backdoor learning does, has overwritten them.

    Differs from the authors' released code in: all training images are measured, not one batch; the layer's ``eps`` is
    added to both variances, so that a channel that is constant on clean data has a finite divergence; the bias is
    silenced with the weight; layers whose weights are frozen are left alone. Of a layer of 10 channels or fewer
    ``u=3`` can never prune any. The report's note tells how many channels were pruned.

    Use it with ``max_epochs: 0``: it is the whole defense.

    Args:
        u: Standard deviations above the layer's mean, at least 0; the released code's is 3. Of several the smallest is
            taken whose clean validation accuracy drops by at most ``max_drop``.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1], where ``u`` is several; 0.01 is one
            point.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2)).eval()
        >>> model[0].running_mean[5] = 9.0
        >>> points = torch.tensor([[-1.0] * 16, [1.0] * 16])
        >>> data = DefenderData(lambda epoch: iter([(points, torch.tensor([0, 1]))]), lambda: iter([]), num_classes=2)
        >>> BatchNormPruning().purify(model, data).note
        'pruned 1 of 16 channels'
        >>> model[0].weight[4:7].tolist()
        [1.0, 0.0, 1.0]
    """

    def __init__(self, u: float | Sequence[float] = 3.0, max_drop: float = 0.01) -> None:
        super().__init__()
        self.u = check_thresholds(u, max_drop)
        self.max_drop = max_drop

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Silence the channels of ``model`` whose statistics differ most, in place.

        Raises:
            NotApplicableError: If no batch normalisation with running statistics and weights that may be changed runs.
            MisconfigurationException: If there are no training images.
        """
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None and is_prunable(module)
        }
        moments = {name: ChannelMoments() for name in layers}
        if layers:
            watch_inputs(model, data, layers, lambda name, values: moments[name].update(values))
        scores = {
            name: (layer, _divergence(layer, moments[name])) for name, layer in layers.items() if moments[name].count
        }
        if not scores:
            raise NotApplicableError(
                "Batch-norm pruning compares running statistics: it needs a batch normalisation that has some, and a "
                "weight and bias that are not frozen; this model has none."
            )
        return prune_outliers(model, data, scores, self.u, self.max_drop)


def _divergence(layer: _BatchNorm, clean: ChannelMoments) -> Tensor:
    """Return how far each channel's clean moments are from the running ones, ``(C,)`` float64."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return gaussian_kl_divergence(
        clean.mean,
        clean.variance + layer.eps,
        layer.running_mean.double(),
        layer.running_var.double() + layer.eps,
    )
