"""The smallest part of an image that keeps a model's output: Cognitive Distillation."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_bd.functional.draws import keyed_generator

__all__ = ("distill", "total_variation")


def total_variation(masks: Tensor) -> Tensor:
    r"""Return how much neighbours differ: the sum of their squared differences over the number of values.

    :math:`\frac{1}{C H W} \sum_{c,i,j} (m_{c,i+1,j} - m_{c,i,j})^2 + (m_{c,i,j+1} - m_{c,i,j})^2`. 0 for a constant
    mask, 1 / W for a vertical edge between 0 and 1.

    Args:
        masks: ``(B, C, H, W)``, floating.

    Returns:
        ``(B,)``, non-negative.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
        tensor([0.5000])
    """
    dims = (1, 2, 3)
    down = (masks[:, :, 1:] - masks[:, :, :-1]).square().sum(dims)
    right = (masks[..., 1:] - masks[..., :-1]).square().sum(dims)
    return (down + right) / masks[0].numel()


def distill(
    model_output: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    alpha: float,
    beta: float = 1.0,
    steps: int = 100,
    lr: float = 0.1,
    mask_channels: int = 1,
    seed: int = 0,
) -> Tensor:
    r"""Find, for each image, the smallest mask that keeps a model's output.

    Minimises over :math:`m = (\tanh \theta + 1) / 2`, with Adam from :math:`\theta = 1` (:math:`m = 0.8808`),

    .. math::
        \frac{1}{D} \lVert f(x) - f(x m + (1 - m) \delta) \rVert_1 + \alpha \lVert m \rVert_1
        + \beta \, \mathrm{TV}(m)

    with :math:`\delta` one colour, uniform in [0, 1], drawn again in each step (`Huang et al., 2023
    <https://arxiv.org/abs/2301.10908>`_). Only the masks get a gradient: nothing is computed for, or written to,
    weights.

    Differs from the authors' code in that all images share the colours, which depend on seed and step alone: an image's
    mask does not depend on the others of its batch. (Rounding may: Adam magnifies it where a gradient is close to 0.)

    Args:
        model_output: Maps images ``(B, C, H, W)`` in [0, 1] to outputs ``(B, D)``, each image's on its own: batch
            normalisation must be in evaluation mode.
        images: ``(B, C, H, W)`` in [0, 1], floating.
        alpha: Weight of the masks' norm, non-negative; paper: 0.01 for logits, 0.001 for features.
        beta: Weight of their total variation, non-negative; paper: 10, default of the authors' code: 1.
        steps: Steps of Adam, non-negative; paper: 100.
        lr: Step size of Adam with betas (0.1, 0.1), positive; paper: 0.1.
        mask_channels: 1 for one mask for all channels of an image, or C.
        seed: Of the colours.

    Returns:
        Masks ``(B, mask_channels, H, W)`` in [0, 1], of the images' dtype but float32 at least, without a graph.

    Raises:
        ValueError: If ``mask_channels`` fits neither one mask nor one for each channel.

    Example:
        A model that sees the first pixel only, with a bright image: only this pixel has to stay.

        >>> image = torch.full((1, 1, 2, 2), 0.9)
        >>> masks = distill(lambda images: 10 * images[:, 0, 0, :1], image, alpha=0.01, beta=0)
        >>> (masks[0, 0] > 0.5).tolist()
        [[True, False], [False, False]]
    """
    count, channels, height, width = images.shape
    if mask_channels not in (1, channels):
        raise ValueError(f"Expected argument `mask_channels` to be 1 or {channels}, but got {mask_channels}.")
    # Steps of Adam would be lost in half precision.
    dtype = torch.promote_types(images.dtype, torch.float32)
    colors = _colors(seed, steps, channels).to(images.device, dtype)
    with torch.no_grad():
        wanted = model_output(images).to(dtype)
    shape = (count, mask_channels, height, width)
    theta = torch.ones(shape, dtype=dtype, device=images.device, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=lr, betas=(0.1, 0.1))
    for color in colors:
        with torch.enable_grad():
            masks = _mask(theta)
            found = model_output((color + masks * (images - color)).to(images.dtype)).to(dtype)
            # Sums over images: the mean would tie their gradients to the size of the batch.
            kept = (found - wanted).abs().mean(dim=1).sum()
            loss = kept + alpha * masks.sum() + beta * total_variation(masks).sum()
        (theta.grad,) = torch.autograd.grad(loss, [theta])
        optimizer.step()
    return _mask(theta.detach())


def _mask(theta: Tensor) -> Tensor:
    return (theta.tanh() + 1) / 2


def _colors(seed: int, steps: int, channels: int) -> Tensor:
    """Return ``(steps, C, 1, 1)``; a step's colour does not depend on the number of steps."""
    drawn = [torch.rand(channels, generator=keyed_generator(seed, "distill", step)) for step in range(steps)]
    return torch.stack(drawn).view(steps, channels, 1, 1) if drawn else torch.empty(0, channels, 1, 1)
