"""Distances between the outputs of two classifiers, sample by sample."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ("softened_divergence", "squared_probability_distance")


def softened_divergence(logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    r"""Divergence of a student's softened probabilities from a teacher's.

    For each sample :math:`T^2 \, \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))` with the logits
    :math:`t` of the teacher and :math:`s` of the student. A high temperature :math:`T` also compares the classes that
    both hold for unlikely; the factor :math:`T^2` keeps the gradient's size, whatever the temperature (`Hinton et al.,
    2015 <https://arxiv.org/abs/1503.02531>`_).

    Args:
        logits: The student's, ``(B, K)``, floating point; half precision is computed in float32.
        teacher_logits: The teacher's, of the same shape.
        temperature: :math:`T`, positive; 2 in `Learning without Forgetting <https://arxiv.org/abs/1606.09282>`_.

    Returns:
        ``(B,)``, at least 0 up to rounding; 0 where both give the same probabilities.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [5.0, 5.0]])
        >>> softened_divergence(student, teacher)
        tensor([1.8485, 0.0000])
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"Expected argument `temperature` to be a positive float, but got {temperature}.")
    logits, teacher_logits = _checked(logits, teacher_logits)
    divergences = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    return divergences.sum(dim=1) * temperature**2


def squared_probability_distance(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Squared Euclidean distance between the class probabilities of two classifiers.

    For each sample :math:`\lVert \mathrm{softmax}(s) - \mathrm{softmax}(t) \rVert^2`.

    Args:
        logits: The student's :math:`s`, ``(B, K)``, floating point; half precision is computed in float32.
        teacher_logits: The teacher's :math:`t`, of the same shape.

    Returns:
        ``(B,)``, between 0 and 2.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> squared_probability_distance(torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]]))
        tensor([2.])
    """
    logits, teacher_logits = _checked(logits, teacher_logits)
    return (logits.softmax(dim=1) - teacher_logits.softmax(dim=1)).square().sum(dim=1)


def _checked(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(
            "Expected arguments `logits` and `teacher_logits` to be of one shape (B, K), but got"
            f" {tuple(logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(logits.dtype, teacher_logits.dtype), torch.float32)
    return logits.to(dtype), teacher_logits.to(dtype)
