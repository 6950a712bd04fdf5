"""ReAct: energy after large activations have been cut off."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.detection.base import FeatureDetector
from lightning_bd.callbacks.detection.energy import energy_of_logits
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.processes import sum_over_processes

__all__ = ("ReAct",)

# Bits of a float32 that numbers of one bin share: sign, exponent and 11 of the mantissa's 23.
_SHARED, _OPEN = 20, 12


class ReAct(FeatureDetector):
    r"""Score an image by the energy of its logits after its features have been cut off at a common threshold.

    .. math:: s(x) = -\log \sum_c e^{z_c}, \qquad z = W \min(h(x), t) + b

    `Sun et al., 2021 <https://arxiv.org/abs/2111.12797>`_: images that the model does not know tend to have a few
    activations that are far too large. :math:`t` is a percentile of all activations of the fit data. Differs from the
    paper in that they are not kept: they are counted in bins of relative width :math:`2^{-11}`, so that memory
    does not grow (8 MiB), batches may come in any order, and processes add up their counts; within a bin, values are
    taken to lie evenly. The threshold is off by 0.05 % of itself at most.

    Args:
        percentile: Of the activations that are left as they are, in (0, 100]; the paper's 90.
        dataloader: Clean batches to fit on; ``None``: those of ``trainer.datamodule.clean_fit_dataloader()``.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If the percentile is out of its range; when fitting, if there are no data or the model has no linear
            layer at its end.

    Example:
        >>> head = Head(torch.eye(2), torch.zeros(2))
        >>> detector = ReAct(percentile=50)
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
        >>> detector.fit(features, features, torch.tensor([1, 1]), head)
        >>> print(f"{float(detector.fitted['threshold']):.3f}")
        2.500
        >>> detector.score(features, features)
        tensor([-2.3133, -3.1936])
    """

    name = "react"
    needs_fit = True
    uses_head = True

    def __init__(
        self,
        percentile: float = 90.0,
        dataloader: Iterable[Any] | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if not 0.0 < percentile <= 100.0:
            raise ValueError(f"Expected argument `percentile` to be a float in (0, 100], but got {percentile}.")
        super().__init__(dataloader=dataloader, in_distribution=in_distribution)
        self.percentile = percentile
        self._head: Head | None = None
        self._counts: Tensor | None = None

    def _begin(self, head: Head | None) -> None:
        if head is None:
            raise ValueError("`ReAct` needs the model's last linear layer, and the features that go into it.")
        self._head = Head(head.weight.clone(), head.bias.clone())
        self._counts = torch.zeros(2**_SHARED, dtype=torch.int64, device=head.weight.device)

    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        assert self._counts is not None
        bins = _keys(features.flatten()) >> _OPEN
        self._counts += torch.bincount(bins, minlength=2**_SHARED).to(self._counts.device)

    def _finish(self) -> dict[str, Tensor]:
        assert self._head is not None
        assert self._counts is not None
        head, counts = self._head, sum_over_processes(self._counts).cpu()
        self._head = self._counts = None
        if not int(counts.sum()):
            raise ValueError("Expected clean data to fit on, but got no image.")
        threshold = torch.tensor(_quantile(counts, self.percentile / 100.0), device=head.weight.device)
        return {"threshold": threshold, "weight": head.weight, "bias": head.bias}

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        fitted = self.fitted
        return energy_of_logits(
            F.linear(torch.minimum(features, fitted["threshold"]), fitted["weight"], fitted["bias"])
        )


def _keys(values: Tensor) -> Tensor:
    """Number float32 values by their order, from 0 to ``2**32 - 1``."""
    bits = values.view(torch.int32).to(torch.int64)
    # Negative numbers have the sign bit set, and larger bits the smaller they are.
    return torch.where(bits < 0, -1 - bits, bits + 2**31)


def _value(key: int) -> float:
    """The float32 of that number."""
    bits = key - 2**31 if key >= 2**31 else -1 - key
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _quantile(counts: Tensor, share: float) -> float:
    """Interpolate between the two values next to ``share * (N - 1)``, as NumPy does."""
    ends = counts.cumsum(0)
    position = share * (int(ends[-1]) - 1)
    below = int(position)
    ranks = (below, min(below + 1, int(ends[-1]) - 1))
    low, high = (_value_of_rank(counts, ends, rank) for rank in ranks)
    return low + (position - below) * (high - low)


def _value_of_rank(counts: Tensor, ends: Tensor, rank: int) -> float:
    found = int(torch.searchsorted(ends, rank, right=True))
    inside = rank - int(ends[found] - counts[found])
    return _value((found << _OPEN) + int((inside + 0.5) / int(counts[found]) * 2**_OPEN))
