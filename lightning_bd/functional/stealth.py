"""How visible a trigger is: PSNR, SSIM and the largest change of a pixel."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ("largest_change", "peak_signal_to_noise_ratio", "structural_similarity")

_WINDOW = 11
_SIGMA = 1.5


def peak_signal_to_noise_ratio(clean: Tensor, changed: Tensor) -> Tensor:
    """Return ``10 * log10(1 / MSE)`` of each image, in dB; infinite for two identical images.

    Args:
        clean: ``(B, C, H, W)`` float, values in [0, 1].
        changed: The same images, changed.

    Returns:
        ``(B,)`` float64.

    Raises:
        ValueError: If the two are not float batches of one shape.

    Example:
        >>> black, grey = torch.zeros(2, 1, 4, 4), torch.tensor([0.1, 0.0]).view(2, 1, 1, 1)
        >>> peak_signal_to_noise_ratio(black, black + grey)
        tensor([20.0000,     inf], dtype=torch.float64)
    """
    _check(clean, changed)
    error = (changed.double() - clean.double()).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


def structural_similarity(clean: Tensor, changed: Tensor) -> Tensor:
    """Return the mean structural similarity of each image (`Wang et al., 2004 <https://doi.org/10.1109/TIP.2003.819861>`_).

    Channel by channel, in the paper's Gaussian window of 11 pixels with a standard deviation of 1.5, where it lies
    inside the image whole. Images of less than 11 pixels get the largest odd window that fits.

    Args:
        clean: ``(B, C, H, W)`` float, values in [0, 1].
        changed: The same images, changed.

    Returns:
        ``(B,)`` float64 in [-1, 1]; 1 for two identical images.

    Raises:
        ValueError: If the two are not float batches of one shape.

    Example:
        >>> image = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
        >>> structural_similarity(image, image), structural_similarity(image, 1 - image) < 0.5
        (tensor([1.], dtype=torch.float64), tensor([True]))
    """
    _check(clean, changed)
    batch, channels, height, width = clean.shape
    # One channel is one image: the window is the same for all.
    x, y = (images.double().reshape(batch * channels, 1, height, width) for images in (clean, changed))
    columns, rows = (_gaussian(side, x.device) for side in (height, width))

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, columns.view(1, 1, -1, 1)), rows.view(1, 1, 1, -1))

    mean_x, mean_y = local(x), local(y)
    # Rounding may make a variance negative.
    variance_x = (local(x * x) - mean_x**2).clamp_min(0)
    variance_y = (local(y * y) - mean_y**2).clamp_min(0)
    covariance = local(x * y) - mean_x * mean_y
    # K1 = 0.01 and K2 = 0.03 of the paper, for values of range 1.
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    likeness = likeness * (2 * covariance + c2) / (variance_x + variance_y + c2)
    return likeness.reshape(batch, -1).mean(dim=1)


def largest_change(clean: Tensor, changed: Tensor) -> Tensor:
    """Return the largest absolute change of a pixel of each image, the L-infinity norm.

    Args:
        clean: ``(B, C, H, W)`` float, values in [0, 1].
        changed: The same images, changed.

    Returns:
        ``(B,)`` float64 in [0, 1].

    Raises:
        ValueError: If the two are not float batches of one shape.

    Example:
        >>> largest_change(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.25, -0.5]]]]))
        tensor([0.5000], dtype=torch.float64)
    """
    _check(clean, changed)
    return (changed.double() - clean.double()).abs().amax(dim=(1, 2, 3))


def _gaussian(side: int, device: torch.device) -> Tensor:
    size = min(_WINDOW, side if side % 2 else side - 1)
    distance = torch.arange(size, dtype=torch.float64, device=device) - size // 2
    weights = torch.exp(-(distance**2) / (2 * _SIGMA**2))
    return weights / weights.sum()


def _check(clean: Tensor, changed: Tensor) -> None:
    for name, images in (("clean", clean), ("changed", changed)):
        if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
            raise ValueError(
                f"Expected argument `{name}` to be a float tensor of shape (B, C, H, W) with B > 0, but got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
    if clean.shape != changed.shape:
        raise ValueError(
            f"Expected argument `changed` to have the shape of `clean`, {tuple(clean.shape)}, but got "
            f"{tuple(changed.shape)}."
        )
