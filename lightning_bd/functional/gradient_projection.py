"""Projection of a gradient that would undo what an earlier task taught."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ("agem_projection",)


@torch.no_grad()
def agem_projection(gradients: Sequence[Tensor], reference: Tensor) -> tuple[list[Tensor], Tensor]:
    r"""Take the part against the reference gradient out of a gradient: :math:`g - \min(g^T r, 0) \, r / r^T r`.

    The result is the vector nearest to :math:`g` along which, to first order, the loss whose gradient is :math:`r`
    does not rise: the step of Averaged Gradient Episodic Memory (`Chaudhry et al., 2019
    <https://arxiv.org/abs/1812.00420>`_). The dot products run over all parameters together, in float32 or more. A
    positive factor of :math:`r`, such as a loss scale, has no effect; one of :math:`g` is kept. Where nothing is to be
    projected, the values of :math:`g` are returned as they are; so they are with an :math:`r` that is zero or not
    finite, and with a :math:`g` that is not finite.

    Args:
        gradients: :math:`g`, one floating point tensor for each parameter, of any shapes, on one device.
        reference: ``(N,)`` :math:`r`, flattened and joined in the order of ``gradients``; not changed.

    Returns:
        The gradient to step along, one new tensor for each in ``gradients`` with its shape and dtype, and whether it
        was projected, a bool tensor without dimensions. Nothing waits for the device.

    Raises:
        ValueError: If ``reference`` has another number of elements than ``gradients``.

    Example:
        >>> agem_projection([torch.tensor([1.0, 1.0])], torch.tensor([-2.0, 0.0]))
        ([tensor([0., 1.])], tensor(True))
        >>> agem_projection([torch.tensor([1.0, 1.0])], torch.tensor([2.0, 0.0]))
        ([tensor([1., 1.])], tensor(False))
    """
    sizes = [gradient.numel() for gradient in gradients]
    if reference.shape != (sum(sizes),):
        raise ValueError(
            f"Expected argument `reference` to have shape ({sum(sizes)},), the size of all `gradients` together, but"
            f" got {tuple(reference.shape)}."
        )
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dtype = torch.promote_types(torch.promote_types(flat.dtype, reference.dtype), torch.float32)
    # With 1 as the largest entry the square below neither overflows nor vanishes. An overflowed gradient becomes NaN.
    direction = reference.to(dtype) / reference.abs().amax().to(dtype)
    product = direction.dot(flat.to(dtype))
    # Comparisons with NaN are false: r = 0 and whatever is not finite end here.
    projected = (product < 0) & product.isfinite()
    coefficient = product / direction.dot(direction)
    # Not a product with zero, which would be NaN for an infinite entry.
    result = torch.where(projected, flat - coefficient * direction, flat)
    pairs = zip(torch.split(result, sizes), gradients, strict=True)
    return [part.view(gradient.shape).to(gradient.dtype) for part, gradient in pairs], projected
