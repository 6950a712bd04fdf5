"""What of the variation of features is that of labels and what that of images."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ("Decomposition", "decompose")

# Part of a feature's variance that is taken for noise, so that labels without any spread can be compared.
_NOISE = 1e-6
# A direction whose variance is a smaller part of the largest one is rounding.
_NEGLIGIBLE = 1e-10
# Images for each direction of a covariance: with fewer it fits noise.
_IMAGES_PER_DIRECTION = 10


class Decomposition(NamedTuple):
    r"""Covariances of what labels and images contribute to features, in coordinates that make both diagonal.

    Attributes:
        whitener: ``(D, r)`` :math:`A`; :math:`A^\top S_\varepsilon A` is the identity.
        ratios: ``(r,)``, the diagonal of :math:`A^\top S_\mu A`.
    """

    whitener: Tensor
    ratios: Tensor


def decompose(means: Tensor, counts: Tensor, within: Tensor, max_iterations: int = 50) -> Decomposition:
    r"""Find the covariances of the labels' and the images' parts of features by expectation maximisation.

    In the model :math:`x = \mu_y + \varepsilon`, :math:`\mu_y \sim N(0, S_\mu)`, :math:`\varepsilon \sim N(0,
    S_\varepsilon)`, the :math:`\mu_y` are hidden. Directions in which features do not vary are left out. Of the others
    at most a tenth of the number of images is looked at, the largest label's not counted, those of the largest
    variance; a millionth of the variance in each is added to :math:`S_\varepsilon`.

    Args:
        means: ``(K, D)`` float64, mean features of the labels, less that of all images.
        counts: ``(K,)`` float64, images per label.
        within: ``(D, D)`` float64, sum over images of the outer product of their features less their label's mean.
        max_iterations: Iterations at most, positive; it ends when nothing changes by a millionth.

    Example:
        >>> means, counts = torch.tensor([[2.0], [-2.0]]).double(), torch.tensor([50.0, 50.0]).double()
        >>> whitener, ratios = decompose(means, counts, within=torch.tensor([[100.0]]).double())
        >>> (whitener.square(), ratios)  # 1 / variance of images, variance of labels / that of images
        (tensor([[0.9800]], dtype=torch.float64), tensor([3.9000], dtype=torch.float64))
    """
    total, labels = counts.sum(), len(means)
    column = counts[:, None]
    variances, directions = torch.linalg.eigh((within + means.T @ (column * means)) / total)
    kept = variances > _NEGLIGIBLE * variances[-1]
    kept[: -_most_directions(counts)] = False
    whitener = directions[:, kept] / variances[kept].sqrt()
    means, within = means @ whitener, whitener.T @ within @ whitener
    identity = torch.eye(len(within), dtype=within.dtype, device=within.device)
    within = within + total * _NOISE * identity
    of_images, of_labels = within / total, means.T @ means / labels
    ratios = of_images.new_zeros(len(within))
    for iteration in range(max_iterations + 1):
        # To coordinates in which S_eps is the identity and S_mu diagonal: all of the posterior is then diagonal.
        moved = _largest(of_images - identity), _largest((of_labels - ratios.diag()) / (1 + ratios))
        change, ratios = _simultaneous(of_images, of_labels)
        whitener, means, within = whitener @ change, means @ change, change.T @ within @ change
        if iteration and max(moved) < 1e-6:
            break
        spread = ratios / (1 + column * ratios)
        expected = column * spread * means
        rest = means - expected
        of_labels = expected.T @ expected / labels + spread.mean(dim=0).diag()
        of_images = (within + rest.T @ (column * rest) + (column * spread).sum(dim=0).diag()) / total
    return Decomposition(whitener, ratios)


def _most_directions(counts: Tensor) -> int:
    """Return how many directions a covariance of the images of all labels but the largest can have."""
    others = counts.sum() - counts.max() if len(counts) > 1 else counts.sum()
    return max(int(others) // _IMAGES_PER_DIRECTION, 1)


def _largest(matrix: Tensor) -> float:
    return float(matrix.abs().max()) if matrix.numel() else 0.0


def _simultaneous(positive: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and d with U^T positive U = 1 and U^T other U = diag(d)."""
    root = torch.linalg.cholesky(positive)
    half = torch.linalg.solve_triangular(root, other, upper=False)
    inner = torch.linalg.solve_triangular(root, half.T, upper=False)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    return torch.linalg.solve_triangular(root.T, vectors, upper=True), values.clamp_min(0)
