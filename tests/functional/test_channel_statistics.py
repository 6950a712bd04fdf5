"""Statistics of channels against NumPy, torch.distributions and closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from lightning_bd.functional.channel_statistics import (
    ChannelMoments,
    gaussian_kl_divergence,
    lipschitz_bounds,
    outliers,
    standardized_entropy,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (4, 1, 3, 3), (3, 20, 1, 1), (6, 2, 5, 1)])
def test_lipschitz_bounds_equal_numpy(shape: tuple[int, ...]) -> None:
    weight, scale = draw(*shape), draw(shape[0], seed=1)
    scale[0] = -scale[0].abs()
    expected = [
        np.linalg.svd((weight[k] * scale[k]).double().reshape(shape[1], -1).numpy())[1].max() for k in range(shape[0])
    ]
    bounds = lipschitz_bounds(weight, scale)
    assert bounds.dtype == torch.float64
    np.testing.assert_allclose(bounds.numpy(), expected, rtol=1e-6)


def test_a_channel_changes_by_no_more_than_the_shared_factor_times_its_bound() -> None:
    """A 3x3 kernel reads each pixel 9 times at most, so that its patches' norm is at most 3 times the image's."""
    weight, scale, image = draw(4, 2, 3, 3), draw(4, seed=1), draw(1, 2, 6, 6, seed=2)
    change = F.conv2d(image, weight, padding=1)[0].flatten(1).norm(dim=1) * scale.abs()
    patches = F.unfold(image, 3, padding=1)[0].reshape(2, 9, -1)
    assert patches.norm() <= 3 * image.norm()
    # |<W, P>| <= sqrt(rank) ||W||_2 ||P||_F at each position.
    assert (change <= math.sqrt(2) * lipschitz_bounds(weight, scale) * patches.norm()).all()


def test_kl_divergence_equals_that_of_torch() -> None:
    means, variances = draw(2, 9).double(), draw(2, 9, seed=1).double().exp()
    expected = kl_divergence(Normal(means[0], variances[0].sqrt()), Normal(means[1], variances[1].sqrt()))
    found = gaussian_kl_divergence(means[0], variances[0], means[1], variances[1])
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()
    assert not torch.allclose(found, gaussian_kl_divergence(means[1], variances[1], means[0], variances[0]))


@pytest.mark.parametrize("width", [0.01, 0.1, 0.37])
def test_entropy_equals_a_histogram_of_numpy(width: float) -> None:
    values = draw(500, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, -3.0, 100.0])
    expected = []
    for column in values.double().numpy().T:
        standard = (column - column.mean()) / column.std()
        edges = standard.min() + width * np.arange(math.ceil(np.ptp(standard) / width) + 2)
        counts = np.histogram(standard, edges)[0]
        share = counts[counts > 0] / len(column)
        expected.append(math.log(width) - (share * np.log(share)).sum())
    # A value within rounding of an edge may fall on the other side: 1 of 500 moves the entropy by less than 0.01.
    np.testing.assert_allclose(standardized_entropy(values, width).numpy(), expected, atol=1e-2)


def test_entropy_of_known_densities() -> None:
    rising = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    normal = torch.special.ndtri(rising)
    # 90 % around 0 and 10 % around 20, both with standard deviation 1: the variance is 1 + 0.09 * 400 = 37.
    groups = torch.cat([normal[k::10] for k in range(10)])
    groups[:10_000] += 20
    values = torch.stack([rising, normal, groups], dim=1)
    expected = [
        0.5 * math.log(12),
        0.5 * math.log(2 * math.pi * math.e),
        0.5 * math.log(2 * math.pi * math.e / 37) - 0.9 * math.log(0.9) - 0.1 * math.log(0.1),
    ]
    np.testing.assert_allclose(standardized_entropy(values, 0.01).numpy(), expected, atol=0.01)
    # Neither place nor scale matters.
    torch.testing.assert_close(
        standardized_entropy(values * 7 - 3, 0.1), standardized_entropy(values, 0.1), rtol=0, atol=1e-3
    )


def test_entropy_of_what_never_changes() -> None:
    values = torch.stack([torch.full((50,), 0.3), draw(50)], dim=1)
    first, second = standardized_entropy(values, 0.1).tolist()
    assert math.isnan(first)
    assert second == standardized_entropy(values[:, 1:], 0.1).item()


def test_outliers_equal_numpy() -> None:
    scores = draw(200)
    for u in (0.0, 0.5, 1.0, 2.0):
        found = outliers(scores, u)
        assert found.tolist() == (scores.numpy() > scores.numpy().mean() + u * scores.numpy().std(ddof=1)).tolist()
        assert 0 < found.sum() < 150


def test_unknown_scores_take_no_part_in_outliers() -> None:
    scores = torch.cat([draw(30), torch.tensor([9.0])])
    with_gaps = torch.cat([torch.tensor([math.nan]), scores, torch.tensor([math.nan])])
    assert outliers(with_gaps, 2.0).tolist() == [False, *outliers(scores, 2.0).tolist(), False]


@pytest.mark.parametrize("scores", [[], [5.0], [math.nan, 5.0], [2.0, 2.0, 2.0]])
def test_nothing_stands_out(scores: list[float]) -> None:
    found = outliers(torch.tensor(scores), 0.0)
    assert found.dtype == torch.bool
    assert found.tolist() == [False] * len(scores)


@pytest.mark.parametrize("channels", [2, 5, 10, 11])
def test_how_far_a_score_can_stand_out(channels: int) -> None:
    """At most (C - 1) / sqrt(C), reached where all others are the same; 3 needs 11 channels."""
    scores = torch.zeros(channels, dtype=torch.float64)
    scores[0] = 1
    limit = (channels - 1) / math.sqrt(channels)
    assert outliers(scores, limit - 1e-6)[0]
    assert not outliers(scores, limit + 1e-6)[0]
    assert outliers(scores, 3.0)[0] == (channels == 11)


@pytest.mark.parametrize("space", [(), (4,), (3, 2)])
def test_moments_over_uneven_batches(space: tuple[int, ...]) -> None:
    values = draw(23, 5, *space) * 0.01 + 1000
    moments = ChannelMoments()
    for batch in torch.split(values, [1, 9, 4, 9]):
        moments.update(batch)
    whole = values.double().numpy().swapaxes(0, 1).reshape(5, -1)
    np.testing.assert_allclose(moments.mean.numpy(), whole.mean(1), rtol=1e-13)
    np.testing.assert_allclose(moments.variance.numpy(), whole.var(1, ddof=1), rtol=1e-7)
    assert moments.count == whole.shape[1]
    assert moments.mean.dtype == moments.variance.dtype == torch.float64


def test_moments_of_one_value() -> None:
    moments = ChannelMoments()
    moments.update(torch.tensor([[3.0, 4.0]]))
    assert moments.mean.tolist() == [3.0, 4.0]
    assert moments.variance.tolist() == [0.0, 0.0]
