"""Per-channel statistics by which backdoored neurons stand out."""

import torch
from torch import Tensor

__all__ = (
    "ChannelMoments",
    "gaussian_kl_divergence",
    "lipschitz_bounds",
    "outliers",
    "standardized_entropy",
)


def lipschitz_bounds(weight: Tensor, scale: Tensor) -> Tensor:
    r"""Bound the Lipschitz constant of each output channel of a convolution that is scaled after it.

    .. math::
        \sigma_k = |s_k| \, \lVert W_k \rVert_2

    with :math:`W_k` the filter of channel k as a matrix, one row for each input channel and one column for each
    position of the kernel, and :math:`\lVert \cdot \rVert_2` its largest singular value: the bound of `Zheng et al.,
    2022 <https://arxiv.org/abs/2208.03111>`_, without the factors that all channels of a layer share. Computed in
    float64 on the CPU.

    Args:
        weight: ``(C_out, C_in, ...)``, float: the convolution's filters.
        scale: ``(C_out,)``, float: what multiplies each channel; for a batch normalisation in evaluation mode
            ``weight / sqrt(running_var + eps)``.

    Returns:
        ``(C_out,)`` float64, at least 0.

    Example:
        >>> lipschitz_bounds(torch.tensor([[[[3.0, 4.0]]], [[[1.0, 0.0]]]]), torch.tensor([1.0, -2.0]))
        tensor([5., 2.], dtype=torch.float64)
    """
    matrices = weight.detach().cpu().double().flatten(2)
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord=2)
    return norms * scale.detach().cpu().double().abs()


def gaussian_kl_divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of normal distributions from others, element by element, in nats.

    .. math::
        D(p \,\Vert\, q) = \frac{1}{2} \log \frac{\sigma_q^2}{\sigma_p^2}
                         + \frac{\sigma_p^2 + (\mu_p - \mu_q)^2}{2 \sigma_q^2} - \frac{1}{2}

    Args:
        mean: Means of p, of any shape.
        variance: Variances of p, positive.
        other_mean: Means of q.
        other_variance: Variances of q, positive.

    Returns:
        The divergences, at least 0.

    Example:
        >>> one = torch.ones(2)
        >>> gaussian_kl_divergence(torch.tensor([0.0, 2.0]), one, 0 * one, one)
        tensor([0., 2.])
    """
    log_ratio = (other_variance / variance).log()
    return 0.5 * (log_ratio + (variance + (mean - other_mean).square()) / other_variance - 1)


def standardized_entropy(values: Tensor, bin_width: float) -> Tensor:
    r"""Estimate the differential entropy of each channel's values after standardising them, in nats.

    The values are brought to mean 0 and standard deviation 1 and counted in bins of width w from the smallest one on;
    with :math:`p_i` the share of bin i the estimate is :math:`\log w - \sum_i p_i \log p_i`. A normal distribution has
    1.419, the most that there is at this variance; two narrow modes far apart have much less. It cannot exceed
    ``log(bin_width * N)``: with too few values for the width all channels look alike. Computed in float64 on the CPU.

    Args:
        values: ``(N, C)``, float.
        bin_width: Width of a bin in standard deviations, positive.

    Returns:
        ``(C,)`` float64; NaN for a channel whose values are all the same.

    Example:
        >>> values = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
        >>> standardized_entropy(values, bin_width=0.5)
        tensor([0.6931,    nan], dtype=torch.float64)
    """
    centered = values.detach().cpu().double()
    centered = centered - centered.mean(0)
    spread = centered.square().mean(0).sqrt()
    constant = centered.amax(0) - centered.amin(0) <= 0
    standard = centered / spread.masked_fill(constant, 1)
    bins = ((standard - standard.amin(0)) / bin_width).floor().long()
    entropies = []
    for column in bins.T:
        share = column.unique(return_counts=True)[1].double() / len(column)
        entropies.append(-torch.special.xlogy(share, share).sum())
    entropy = torch.stack(entropies) + torch.tensor(bin_width, dtype=torch.float64).log()
    return entropy.masked_fill(constant, float("nan"))


def outliers(scores: Tensor, u: float) -> Tensor:
    """Say which scores of a layer exceed their mean by more than ``u`` standard deviations.

    The standard deviation is the unbiased one. Of C scores none can exceed the mean by more than (C - 1) / sqrt(C)
    deviations, so that ``u=3`` finds nothing in a layer of 10 channels or fewer.

    Args:
        scores: ``(C,)``, float; NaN takes no part.
        u: Number of standard deviations.

    Returns:
        ``(C,)`` bool.

    Example:
        >>> outliers(torch.tensor([1.0, 1.0, 1.0, 9.0]), u=1.0)
        tensor([False, False, False,  True])
    """
    known = scores[~scores.isnan()]
    if len(known) < 2:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores > known.mean() + u * known.std()


class ChannelMoments:
    """Mean and variance of each channel over batches of any size, exactly, in float64.

    The batches' moments are combined as by `Chan et al., 1983
    <https://doi.org/10.1080/00031305.1983.10483115>`_; the order and size of the batches change the result by rounding
    only.

    Example:
        >>> moments = ChannelMoments()
        >>> moments.update(torch.tensor([[1.0], [2.0]]))
        >>> moments.update(torch.tensor([[6.0]]))
        >>> moments.mean, moments.variance
        (tensor([3.], dtype=torch.float64), tensor([7.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Take more values.

        Args:
            values: ``(B, C)`` or ``(B, C, ...)``, float, not empty.
        """
        flat = values.detach().double().transpose(0, 1).flatten(1)
        count = flat.shape[1]
        mean = flat.mean(1)
        squares = (flat - mean[:, None]).square().sum(1)
        if self.count:
            total = self.count + count
            step = mean - self.mean
            squares = self._squares + squares + step.square() * (self.count * count / total)
            mean = self.mean + step * (count / total)
        self.count += count
        self.mean, self._squares = mean, squares

    @property
    def variance(self) -> Tensor:
        """The unbiased variances ``(C,)``; of a single value 0."""
        return self._squares / max(self.count - 1, 1)
