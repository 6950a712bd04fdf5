"""Weight perturbations and gradients of sharpness-aware minimization and its variants."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = (
    "asam_perturbation",
    "global_norm",
    "gsam_gradient",
    "looksam_direction",
    "looksam_gradient",
    "sam_perturbation",
)

_EPSILON = 1e-12


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    r"""Euclidean norm of all tensors together, as if they were one long vector.

    Half precision tensors are accumulated in float32, for their squares leave the range of float16 soon.

    Args:
        tensors: Floating point tensors of any shapes on one device; at least one.

    Returns:
        The norm, a float32 (float64 if any tensor is float64) tensor without dimensions. Nothing waits for the device.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    norms = torch._foreach_norm(list(tensors), 2, dtype=_accumulation_dtype(tensors))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def sam_perturbation(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    r"""Step of length ``rho`` along the gradient: :math:`\epsilon = \rho \, g / \lVert g \rVert`.

    To first order the loss is highest there in a ball of radius ``rho``
    (`Foret et al., 2021 <https://arxiv.org/abs/2010.01412>`_). The norm is that of all parameters together.

    Args:
        gradients: The gradient at the weights, one tensor for each parameter.
        rho: Radius of the ball, at least 0; 0.05 in the paper for CIFAR.

    Returns:
        The perturbation, one tensor for each gradient, of its shape and dtype.

    Example:
        >>> sam_perturbation([torch.tensor([3.0]), torch.tensor([4.0])], rho=0.5)
        [tensor([0.3000]), tensor([0.4000])]
    """
    return _scaled(gradients, rho / (global_norm(gradients) + _EPSILON))


def asam_perturbation(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], rho: float, eta: float = 0.01
) -> list[Tensor]:
    r"""Scale-invariant SAM step: :math:`\epsilon = \rho \, T^2 g / \lVert T g \rVert`.

    :math:`T = |w| + \eta` for weights (two or more dimensions) and 1 for biases and normalisation parameters, so that
    rescaling a layer does not change its sharpness (`Kwon et al., 2021 <https://arxiv.org/abs/2102.11600>`_).

    Args:
        gradients: The gradient at the weights, one tensor for each parameter.
        parameters: The weights, in the same order.
        rho: Radius in the rescaled space, at least 0; 0.5 to 2 in the paper.
        eta: Stabiliser, at least 0; 0.01 in the paper.

    Returns:
        The perturbation, one tensor for each gradient, of its shape and dtype.

    Example:
        >>> weight, bias = torch.tensor([[1.99]]), torch.tensor([7.0])
        >>> asam_perturbation([torch.tensor([[1.5]]), torch.tensor([4.0])], [weight, bias], rho=1.0)
        [tensor([[1.2000]]), tensor([0.8000])]
    """
    scaled = list(gradients)
    matrices = [index for index, parameter in enumerate(parameters) if parameter.ndim > 1]
    if not matrices:
        return sam_perturbation(gradients, rho)
    factors = torch._foreach_abs([parameters[index] for index in matrices])
    torch._foreach_add_(factors, eta)
    products = torch._foreach_mul(factors, [gradients[index] for index in matrices])
    for index, product in zip(matrices, products, strict=True):
        scaled[index] = product
    norm = global_norm(scaled)
    torch._foreach_mul_(products, factors)
    return _scaled(scaled, rho / (norm + _EPSILON))


def gsam_gradient(gradients: Sequence[Tensor], sharp_gradients: Sequence[Tensor], alpha: float) -> list[Tensor]:
    r"""Gradient of surrogate-gap minimization: :math:`g_s - \alpha \, g_\perp`.

    :math:`g_\perp` is the part of the gradient :math:`g` at the weights that is orthogonal to the gradient :math:`g_s`
    at the perturbed weights. Descending :math:`g_s` and ascending :math:`g_\perp` shrinks the gap between the two
    losses (`Zhuang et al., 2022 <https://arxiv.org/abs/2203.08065>`_).

    Args:
        gradients: The gradient at the weights.
        sharp_gradients: The gradient at the perturbed weights, in the same order.
        alpha: Weight of the orthogonal part, at least 0; 0 is SAM; 0.2 to 0.4 in the paper.

    Returns:
        The gradient to step along, one tensor for each parameter.

    Example:
        >>> gsam_gradient([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])], alpha=0.5)
        [tensor([ 2.0000, -0.5000])]
    """
    orthogonal = _orthogonal_part(gradients, sharp_gradients)
    return list(torch._foreach_sub(list(sharp_gradients), orthogonal, alpha=alpha))


def looksam_direction(gradients: Sequence[Tensor], sharp_gradients: Sequence[Tensor]) -> list[Tensor]:
    r"""Unit vector along the part of :math:`g_s` that is orthogonal to :math:`g`.

    This part of the SAM gradient changes slowly during training and may be used for some steps
    (`Liu et al., 2022 <https://arxiv.org/abs/2203.02714>`_).

    Args:
        gradients: The gradient at the weights.
        sharp_gradients: The gradient at the perturbed weights, in the same order.

    Returns:
        :math:`v / \lVert v \rVert`, one tensor for each parameter; zeros if the two gradients are parallel.

    Example:
        >>> looksam_direction([torch.tensor([2.0, 0.0])], [torch.tensor([1.0, 3.0])])
        [tensor([0., 1.])]
    """
    orthogonal = _orthogonal_part(sharp_gradients, gradients)
    return _scaled(orthogonal, 1 / (global_norm(orthogonal) + _EPSILON))


def looksam_gradient(gradients: Sequence[Tensor], direction: Sequence[Tensor], alpha: float) -> list[Tensor]:
    r"""Gradient between two full steps of LookSAM: :math:`g + \alpha \lVert g \rVert \, v / \lVert v \rVert`.

    Args:
        gradients: The gradient at the weights.
        direction: The unit vector of :func:`looksam_direction`, in the same order.
        alpha: Weight of the direction, at least 0; 0 is the plain gradient; 0.7 in the paper.

    Returns:
        The gradient to step along, one tensor for each parameter.

    Example:
        >>> looksam_gradient([torch.tensor([2.0, 0.0])], [torch.tensor([0.0, 1.0])], alpha=0.5)
        [tensor([2., 1.])]
    """
    return list(torch._foreach_add(list(gradients), _scaled(direction, alpha * global_norm(gradients))))


def _orthogonal_part(vectors: Sequence[Tensor], axis: Sequence[Tensor]) -> list[Tensor]:
    """What is left of ``vectors`` after its projection on ``axis`` is taken away, both seen as one long vector."""
    dtype = _accumulation_dtype(axis)
    flat_vector = torch.cat([tensor.reshape(-1) for tensor in vectors]).to(dtype)
    flat_axis = torch.cat([tensor.reshape(-1) for tensor in axis]).to(dtype)
    # The clamp matters for an axis of zeros only: the product is then zero too.
    coefficient = flat_vector.dot(flat_axis) / flat_axis.dot(flat_axis).clamp_min(torch.finfo(dtype).tiny)
    return list(torch._foreach_sub(list(vectors), _scaled(axis, coefficient)))


def _scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Multiply by a tensor without dimensions, which needs no wait for the device, and keep the dtypes."""
    products = torch._foreach_mul(list(tensors), factor)
    # Only a parameter without dimensions takes on the dtype of the factor.
    return [product.to(tensor.dtype) for product, tensor in zip(products, tensors, strict=True)]


def _accumulation_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32
