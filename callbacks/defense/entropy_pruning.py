"""Entropy pruning: silence the channels whose values fall into two groups."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.outlier_pruning import (
    check_thresholds,
    is_prunable,
    prune_outliers,
    watch_inputs,
)
from lightning_bd.functional.channel_statistics import standardized_entropy

__all__ = ("EntropyPruning",)


class EntropyPruning(Defense):
    """Prunes channels whose pre-activations have a low differential entropy (``ep``).

    `Zheng et al., 2022 <https://openreview.net/forum?id=wwW-1k1ljIg>`_: over data in which some images carry the
    trigger, a channel that reacts to it has two groups of values, and after standardising a lower entropy than a
    channel with one. The values are the maxima over space of what goes into each batch normalisation, in evaluation
    mode, for each image; the entropy is estimated by a histogram (see
    :func:`~lightning_bd.functional.channel_statistics.standardized_entropy`). A channel below the layer's mean minus
    ``u`` standard deviations is silenced in the normalisation's weight and bias.

    **It needs poisoned data.** The paper's defender holds the suspicious training set; hand it over with
    ``purify(model, DefenderData(train=..., ...))``. A defending phase has clean images only, and on them a low entropy
    says nothing about a trigger: there it prunes channels that are unusual for other reasons and is not expected to
    lower the attack success (on poisoned digits it did not). It runs there for comparison's sake.

    Differs from the authors' released code in: bins start at each channel's smallest value; channels that never
    change are left alone; the bias is silenced with the weight; layers whose weights are frozen are left alone. Of a
    layer of 10 channels or fewer ``u=3`` can never prune any. The report's note tells how many channels were pruned.
    Takes four bytes of memory for each image and channel.

    Use it with ``max_epochs: 0``: it is the whole defense.

    Args:
        u: Standard deviations below the layer's mean, at least 0; the released code's is 3. Of several the smallest is
            taken whose validation accuracy drops by at most ``max_drop``.
        bin_width: Width of the histogram's bins in standard deviations, positive; the released code's is 0.01, for
            50,000 images. A few hundred images tell more with 0.1.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1], where ``u`` is several; 0.01 is one
            point.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2)).eval()
        >>> points = torch.arange(100.0)[:, None].repeat(1, 16)
        >>> points[:, 5] = (points[:, 5] > 89).float()
        >>> data = DefenderData(lambda epoch: iter([(points, torch.zeros(100))]), lambda: iter([]), num_classes=2)
        >>> EntropyPruning().purify(model, data).note
        'pruned 1 of 16 channels'
        >>> model[0].weight[4:7].tolist()
        [1.0, 0.0, 1.0]
    """

    def __init__(self, u: float | Sequence[float] = 3.0, bin_width: float = 0.01, max_drop: float = 0.01) -> None:
        super().__init__()
        self.u = check_thresholds(u, max_drop)
        if not bin_width > 0:
            raise ValueError(f"Expected argument `bin_width` to be a positive float, but got {bin_width}.")
        self.bin_width = bin_width
        self.max_drop = max_drop

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Silence the channels of ``model`` that have the lowest entropy, in place.

        Raises:
            NotApplicableError: If no batch normalisation with weights that may be changed runs.
            MisconfigurationException: If there are no training images.
        """
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and is_prunable(module)
        }
        maxima: dict[str, list[Tensor]] = {name: [] for name in layers}

        def see(name: str, values: Tensor) -> None:
            """Keep the largest value over space of each image and channel."""
            maxima[name].append(values.detach().reshape(*values.shape[:2], -1).amax(2).float().cpu())

        if layers:
            watch_inputs(model, data, layers, see)
        scores = {
            name: (layer, -standardized_entropy(torch.cat(maxima[name]), self.bin_width))
            for name, layer in layers.items()
            if maxima[name]
        }
        if not scores:
            raise NotApplicableError(
                "Entropy pruning looks at what goes into a batch normalisation and prunes there: it needs one with a "
                "weight and bias that are not frozen; this model has none."
            )
        return prune_outliers(model, data, scores, self.u, self.max_drop)
