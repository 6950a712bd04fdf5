"""SCALE-UP: whether a prediction survives that all pixels are amplified."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection.base import InputDetector

__all__ = ("ScaleUp",)


class ScaleUp(InputDetector):
    r"""Scores an image by how often its prediction stays when its pixels are amplified (``scale_up``).

    Predictions of triggered images stay (`Guo et al., 2023 <https://arxiv.org/abs/2302.03251>`_):

    .. math::
        s(x) = \frac{1}{|S|} \sum_{n \in S} 1\left[C(\mathrm{clip}(n x)) = C(x)\right]

    with :math:`C` the predicted class and pixels clipped to [0, 1]. This is the paper's data-free variant: it needs
    predicted labels only. The score has no more than :math:`|S| + 1` different values, so that many images tie.

    Where clean images are black and white already, as drawings are, they survive the scaling as well as triggers do.

    Args:
        scales: The factors :math:`S`, each above 1; paper: 3, 5, 7, 9, 11.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If ``scales`` is empty or holds a factor that is not above 1.

    Example:
        A model that says whether the pixels' sum is above 2, and images that reach it in the third and last scaling:

        >>> class Sums(nn.Module):
        ...     def forward(self, images: Tensor) -> Tensor:
        ...         return torch.stack([torch.full((len(images),), 2.0), images.sum(dim=(1, 2, 3))], dim=1)
        >>> images = torch.stack([torch.full((1, 2, 2), 0.08), torch.full((1, 2, 2), 0.05)])
        >>> ScaleUp().score(Sums(), images)
        tensor([0.4000, 0.8000])
    """

    name = "scale_up"

    def __init__(self, scales: Sequence[float] = (3, 5, 7, 9, 11), in_distribution: str | None = None) -> None:
        if not scales or not all(1 < scale < float("inf") for scale in scales):
            raise ValueError(f"Expected argument `scales` to be finite numbers above 1, but got {scales}.")
        super().__init__(in_distribution=in_distribution)
        self.scales = tuple(scales)

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        predicted = model(images).argmax(dim=1)
        same = torch.zeros(len(images), device=images.device)
        for scale in self.scales:
            same += model((scale * images).clamp(0, 1)).argmax(dim=1) == predicted
        return same / len(self.scales)
