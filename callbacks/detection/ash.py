"""ASH: energy after small activations have been removed."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.detection.base import FeatureDetector
from lightning_bd.callbacks.detection.energy import energy_of_logits
from lightning_bd.callbacks.detection.features import Head

__all__ = ("ASH", "shaped_activations")

# Finite after exponentiation in float32, times any usual features and weights.
_LARGEST_EXPONENT = 60.0


def shaped_activations(
    features: Tensor, percentile: float = 90.0, variant: Literal["ash_s", "ash_p", "ash_b"] = "ash_s"
) -> Tensor:
    r"""Keep the largest of each image's activations, and set the others to zero.

    Of D activations :math:`k = D - \mathrm{round}(D q / 100)` are kept, at least one. ``ash_p`` leaves these as
    they are; ``ash_s`` multiplies them by :math:`e^{s_1 / s_2}` with the sums of the image's activations before
    (:math:`s_1`) and after (:math:`s_2`); ``ash_b`` sets each to :math:`s_1 / k`. Of equal activations the first are
    kept. A ratio above 60, which activations that are all at least 0 cannot reach up to a percentile of 98, counts as
    60; one that is not defined, where nothing is left, as 0.

    Args:
        features: ``(B, D)``, floating.
        percentile: q, the share that is removed, in [0, 100).
        variant: What happens to those that are kept.

    Returns:
        ``(B, D)``, of the features' dtype.

    Example:
        >>> shaped_activations(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), percentile=50, variant="ash_b")
        tensor([[0., 5., 0., 5.]])
    """
    width = features.shape[1]
    kept = max(1, width - round(width * percentile / 100.0))
    largest = features.argsort(dim=1, descending=True, stable=True)[:, :kept]
    before = features.sum(dim=1, keepdim=True)
    if variant == "ash_b":
        return torch.zeros_like(features).scatter(1, largest, (before / kept).expand(-1, kept))
    values = features.gather(1, largest)
    if variant == "ash_s":
        exponent = (before / values.sum(dim=1, keepdim=True)).nan_to_num(nan=0.0)
        values = values * exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp()
    return torch.zeros_like(features).scatter(1, largest, values)


class ASH(FeatureDetector):
    r"""Score an image by the energy of its logits after most of its features have been removed.

    .. math:: s(x) = -\log \sum_c e^{z_c}, \qquad z = W \, \mathrm{ash}(h(x)) + b

    Activation shaping (`Djurisic et al., 2023 <https://arxiv.org/abs/2209.09858>`_), see :func:`shaped_activations`;
    it is made for activations that are at least 0. It needs no data, but the model's last linear layer, which it is
    given as it is when scoring starts. Shapes the features that go into that layer, as the paper does by default; maps
    are averaged before.

    Args:
        percentile: Share of an image's activations that is removed, in [0, 100); the paper's 90 for ``ash_s`` on
            ImageNet.
        variant: ``ash_s`` scales those that are kept, ``ash_p`` leaves them, ``ash_b`` makes them equal.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If a value is out of its range; when scoring starts, if the model has no linear layer at its end.

    Example:
        >>> detector = ASH(percentile=50, variant="ash_p")
        >>> detector.begin_fit(Head(torch.eye(2), torch.zeros(2)))
        >>> detector.finish_fit()
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 3.0]])
        >>> detector.score(features, features)
        tensor([-2.1269, -3.0486])
    """

    name = "ash"
    uses_head = True

    def __init__(
        self,
        percentile: float = 90.0,
        variant: Literal["ash_s", "ash_p", "ash_b"] = "ash_s",
        in_distribution: str | None = None,
    ) -> None:
        if not 0.0 <= percentile < 100.0:
            raise ValueError(f"Expected argument `percentile` to be a float in [0, 100), but got {percentile}.")
        if variant not in ("ash_s", "ash_p", "ash_b"):
            raise ValueError(f'Expected argument `variant` to be "ash_s", "ash_p" or "ash_b", but got {variant!r}.')
        super().__init__(in_distribution=in_distribution)
        self.percentile = percentile
        self.variant: Literal["ash_s", "ash_p", "ash_b"] = variant
        self._head: Head | None = None

    def _begin(self, head: Head | None) -> None:
        if head is None:
            raise ValueError("`ASH` needs the model's last linear layer, and the features that go into it.")
        self._head = Head(head.weight.clone(), head.bias.clone())

    def _finish(self) -> dict[str, Tensor]:
        assert self._head is not None
        head, self._head = self._head, None
        return head._asdict()

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        shaped = shaped_activations(features, self.percentile, self.variant)
        return energy_of_logits(F.linear(shaped, self.fitted["weight"], self.fitted["bias"]))
