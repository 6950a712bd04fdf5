"""Projected gradient ascent in the pixels of images."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ("projected_gradient_ascent",)


@torch.inference_mode(False)
@torch.enable_grad()
def projected_gradient_ascent(
    objective: Callable[[Tensor], Tensor], images: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    r"""Raise an objective by changing each pixel by at most ``epsilon``.

    Steps along the sign of the gradient, each followed by the projection onto the L-infinity ball around the images and
    onto [0, 1]: :math:`x_{t+1} = \Pi(x_t + \alpha \, \mathrm{sign} \nabla h(x_t))`, from :math:`x_0 = x`
    (`Madry et al., 2018 <https://arxiv.org/abs/1706.06083>`_, who also start at random points). Nothing is drawn.

    Args:
        objective: What to maximise, summed over the images: maps ``(B, C, H, W)`` to a tensor without dimensions. No
            image may have a part in another's value.
        images: ``(B, C, H, W)`` floating-point in [0, 1]. Not modified.
        epsilon: Radius of the ball, not negative.
        step_size: Step :math:`\alpha`, positive.
        steps: Number of steps, not negative.

    Returns:
        New images of the same shape, dtype and device, in [0, 1].

    Example:
        >>> images = torch.tensor([0.5, 0.95]).view(2, 1, 1, 1)
        >>> projected_gradient_ascent(lambda batch: batch.square().sum(), images, 0.1, 0.07, steps=2).flatten()
        tensor([0.6000, 1.0000])
    """
    start = images.detach().clone()
    low, high = (start - epsilon).clamp_(min=0), (start + epsilon).clamp_(max=1)
    moved = start
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(moved), moved)
        moved = torch.clamp(moved.detach() + step_size * gradient.sign(), low, high)
    return moved.detach()
