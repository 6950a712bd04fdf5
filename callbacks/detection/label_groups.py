"""What the detectors that look at a data set label by label share."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ("FEWEST_IMAGES", "LabelGroup", "best_cut", "label_groups", "principal_components")

#: Labels with fewer images are not judged: nothing stands out of so few.
FEWEST_IMAGES = 10

# A direction whose variance is a smaller part of the largest one is rounding.
_NEGLIGIBLE = 1e-10


class LabelGroup(NamedTuple):
    """The images of one label.

    Attributes:
        label: The label.
        rows: ``(n,)`` int64, ascending, the images' positions in the data set.
        mean: ``(D,)`` float64, mean of their features.
        centred: ``(n, D)`` float64, their features less the mean.
    """

    label: int
    rows: Tensor
    mean: Tensor
    centred: Tensor


def label_groups(features: Tensor, labels: Tensor) -> Iterator[LabelGroup]:
    """Yield the images of each label that has at least :data:`FEWEST_IMAGES`, by ascending label.

    Only one label's features are held in float64 at a time, on their device, or the CPU where that has no float64.

    Args:
        features: ``(N, D)``, floating.
        labels: ``(N,)``, integers, in any order and with any gaps.

    Example:
        >>> features, labels = torch.arange(12.0).reshape(12, 1), torch.tensor([7] * 11 + [3])
        >>> [(group.label, len(group.rows), group.mean) for group in label_groups(features, labels)]
        [(7, 11, tensor([5.], dtype=torch.float64))]
    """
    if features.device.type == "mps":
        features = features.cpu()
    order = labels.argsort(stable=True).to(features.device)
    start = 0
    for label, count in sorted(Counter(labels.tolist()).items()):
        rows = order[start : start + count]
        start += count
        if count >= FEWEST_IMAGES:
            own = features[rows].double()
            # A mean of equal float32 values is exact in float64: constant features are exactly 0 afterwards.
            mean = own.mean(dim=0)
            yield LabelGroup(label, rows, mean, own.sub_(mean))


def principal_components(centred: Tensor, count: int) -> Tensor:
    """Return the coordinates of images along the directions in which they vary most.

    Args:
        centred: ``(n, D)`` float64, of mean 0.
        count: How many directions, at least 1.

    Returns:
        ``(n, d)`` float64, the direction of largest variance first; ``d <= count`` is smaller where the images vary in
        fewer directions, 0 if they are all the same.

    Example:
        >>> principal_components(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), count=2).abs()
        tensor([[1.],
                [1.]], dtype=torch.float64)
    """
    # The smaller of the two matrices with the same eigenvalues.
    by_image = len(centred) < centred.shape[1]
    squares, vectors = torch.linalg.eigh(centred @ centred.T if by_image else centred.T @ centred)
    squares, vectors = squares.flip(0)[:count], vectors.flip(1)[:, :count]
    kept = squares > _NEGLIGIBLE * squares[:1]
    vectors = vectors[:, kept]
    components: Tensor = vectors * squares[kept].sqrt() if by_image else centred @ vectors
    return components


def best_cut(values: Tensor) -> Tensor:
    """Return where a line of numbers is cut into the two groups that differ most from their insides.

    The sum of squared distances to the groups' means is the smallest (`Otsu, 1979
    <https://doi.org/10.1109/TSMC.1979.4310076>`_).

    Args:
        values: ``(n,)`` float64, of mean 0, not all the same.

    Returns:
        ``(n,)`` bool, true above the cut.

    Example:
        >>> best_cut(torch.tensor([-2.0, 5.0, -2.5, -0.5]).double())
        tensor([False,  True, False, False])
    """
    ordered = values.sort().values
    below = torch.arange(1, len(values), dtype=values.dtype, device=values.device)
    sums = ordered.cumsum(dim=0)[:-1]
    cut = ordered[(sums.square() / (below * (len(values) - below))).argmax()]
    return values.gt(cut)
