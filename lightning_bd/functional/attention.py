"""Attention maps of feature maps, and how far two networks' maps are apart."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ("attention_loss", "attention_map")


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    r"""Where a layer is active, whatever the channel: :math:`\sum_c |f_c|^p`, scaled to Euclidean norm 1 over space.

    The map of attention transfer (`Zagoruyko and Komodakis, 2017 <https://arxiv.org/abs/1612.03928>`_) and neural
    attention distillation (`Li et al., 2021 <https://arxiv.org/abs/2101.05930>`_). Half precision is computed in
    float32, for powers leave its range soon.

    Args:
        features: ``(B, C, H, W)`` feature maps, or ``(B, N, D)`` tokens of dimension D, of any sign, in floating point.
        p: The power, at least 1; 2 in both papers.

    Returns:
        ``(B, H * W)`` or ``(B, N)`` in [0, 1], float32 (float64 if ``features`` are); zeros where all features of an
        image are zero.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> attention_map(torch.tensor([[[[1.0, 0.0]], [[1.0, -2.0]]]]))
        tensor([[0.4472, 0.8944]])
    """
    if features.ndim not in (3, 4):
        raise ValueError(
            f"Expected argument `features` to be of shape (B, C, H, W) or (B, N, D), but got {tuple(features.shape)}."
        )
    if not 1 <= p < float("inf"):
        raise ValueError(f"Expected argument `p` to be a finite number of at least 1, but got {p}.")
    magnitudes = features.to(torch.promote_types(features.dtype, torch.float32)).abs()
    sums = magnitudes.pow(p).sum(dim=1 if features.ndim == 4 else 2)
    return F.normalize(sums.flatten(1), dim=1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], p: float = 2.0) -> Tensor:
    r"""Sum over layers of the mean squared difference of two networks' attention maps.

    The mean is over images and positions, so that the term of a layer with N positions is at most :math:`2 / N`.

    Args:
        student: The features of each layer, ``(B, C, H, W)`` or ``(B, N, D)``.
        teacher: The same layers' features in the other network, in the same order and of the same numbers of images
            and positions; the numbers of channels may differ.
        p: The power in :func:`attention_map`.

    Returns:
        A tensor without dimensions.

    Raises:
        ValueError: If the numbers of layers differ or are zero, two maps are of different sizes, or an argument is out
            of its range.

    Example:
        >>> attention_loss([torch.tensor([[[[1.0, 0.0]]]])], [torch.tensor([[[[0.0, 3.0]]]])])
        tensor(1.)
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            "Expected arguments `student` and `teacher` to hold the features of the same layers, at least one, but got"
            f" {len(student)} and {len(teacher)}."
        )
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        maps = attention_map(ours, p), attention_map(theirs, p)
        if maps[0].shape != maps[1].shape:
            raise ValueError(
                "Expected arguments `student` and `teacher` to have maps of the same size, but got features of shapes"
                f" {tuple(ours.shape)} and {tuple(theirs.shape)}."
            )
        terms.append(F.mse_loss(*maps))
    return torch.stack(terms).sum()
