"""SCAn: a poisoned label holds two groups of images where others hold one."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_bd.callbacks.detection.base import DatasetDetector
from lightning_bd.callbacks.detection.decomposition import decompose
from lightning_bd.callbacks.detection.label_groups import best_cut, label_groups, principal_components

__all__ = ("LabelTest", "SCAn")

# The hyperplane between two groups is at rest after a few steps; this bounds ties that go round in circles.
_MOST_STEPS = 100
# Spread of the statistic over labels below which it is no yardstick; halves of a normal distribution give 1.
_LEAST_SPREAD = 1e-3


class LabelTest(NamedTuple):
    """What SCAn finds of one label.

    Attributes:
        label: The label.
        images: How many it has.
        smaller: How many of these are in the smaller of the two groups.
        statistic: The likelihood ratio :math:`J`, at least 0.
        anomaly: :math:`J^*`, the label's distance from the median of the labels in robust standard deviations; above
            0 where it falls into two groups more than others do.
    """

    label: int
    images: int
    smaller: int
    statistic: float
    anomaly: float


class SCAn(DatasetDetector):
    r"""Test each label for two groups of images, and suspect the smaller group of those that stand out.

    Features are taken as :math:`x = \mu_y + \varepsilon`, the label's part and the image's own, normal with covariances
    :math:`S_\mu` and :math:`S_\varepsilon` that all labels share and that expectation maximisation estimates (`Tang et
    al., 2021 <https://arxiv.org/abs/1908.00686>`_). For each label a hyperplane that cuts its images into two groups is
    moved until it is the boundary between normal distributions at the groups' means with covariance
    :math:`S_\varepsilon`, and two groups are tested against one:

    .. math::
        J_y = \sum_{x \in y} (x - \hat\mu_y)^\top S_\varepsilon^{-1} (x - \hat\mu_y)
        - (x - \hat\mu_{g(x)})^\top S_\varepsilon^{-1} (x - \hat\mu_{g(x)})

    :math:`J^*_y` is its distance from the median over labels in units of 1.4826 times the median absolute deviation;
    the paper calls a label poisoned above :math:`e^2 = 7.39` (see :meth:`label_tests`). An image's score is

    .. math::
        s(x, y) = \log(1 + e^{J^*_y}) \left( 1 + \frac{1}{2} \frac{l(x)}{1 + |l(x)|} \right), \qquad
        l(x) = \log \frac{p(x \mid \text{smaller group})}{p(x \mid \text{larger group})}

    The label comes first and the group second: where the poisoned images are half of a label or more, as a rate of 0.1
    makes them of one target among ten labels, the wrong group comes first, but still the right label.

    Differs from the paper in that:

    - no clean images are needed. There, the covariances come from such; here from the judged data set, for each label
      from the images of the other labels, as poison would hide behind the variance that it adds;
    - the expectation maximisation is exact: the posterior's covariance is counted;
    - before labels are compared, :math:`J` is divided by :math:`\frac{2}{\pi} n \left( (1 + \sqrt{a + b - ab}) /
      (1 - b) \right)^2` with :math:`a = r / n` and :math:`b = r / (N - n)`, about what the halves of a single normal
      distribution give for :math:`n` of :math:`N` images in :math:`r` dimensions. Where all labels have equally many
      images, :math:`J^*` is as it was;
    - the sign of :math:`J^*` is kept: a label that is more of one piece than others is no sign of poison;
    - there is a score per image.

    It needs several labels, most of them clean: with one or two, :math:`J^*` says nothing. Images of a label with fewer
    than 10 images score 0 and are not counted in the covariances. Of the directions in which features vary at most a
    tenth of the number of images is looked at, those of the largest variance, as a covariance of more would fit noise;
    where these are all, the score does not change when features are mapped linearly, one to one.

    Args:
        max_iterations: Iterations of the expectation maximisation at most, positive; it ends when nothing changes.
        layer: Qualified name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Has no effect: a data set is judged by itself.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> features = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.arange(300) % 5
        >>> features[:50:5] += 6.0
        >>> SCAn().score(features, labels).topk(10).indices.sort().values
        tensor([ 0,  5, 10, 15, 20, 25, 30, 35, 40, 45])
        >>> [test.label for test in SCAn().label_tests(features, labels) if test.anomaly > 7.39]
        [0]
    """

    name = "scan"

    def __init__(self, max_iterations: int = 50, layer: str | None = None, in_distribution: str | None = None) -> None:
        super().__init__(layer=layer, in_distribution=in_distribution)
        if max_iterations < 1:
            raise ValueError(f"Expected argument `max_iterations` to be a positive integer, but got {max_iterations}.")
        self.max_iterations = max_iterations

    @torch.no_grad()
    def label_tests(self, features: Tensor, labels: Tensor) -> list[LabelTest]:
        """Return what is found of each label with at least 10 images, by ascending label.

        Args:
            features: ``(N, D)``, floating and finite.
            labels: ``(N,)``, integers.
        """
        return [found for found, _rows, _odds in self._test(features, labels)]

    def _score(self, features: Tensor, labels: Tensor) -> Tensor:
        scores = features.new_zeros(len(features))
        for found, rows, odds in self._test(features, labels):
            weight = softplus(odds.new_tensor(found.anomaly))
            scores[rows.to(scores.device)] = (weight * (1 + odds / (1 + odds.abs()) / 2)).to(scores)
        return scores

    def _test(self, features: Tensor, labels: Tensor) -> list[tuple[LabelTest, Tensor, Tensor]]:
        """Return of each label its test, its images' positions and their log-odds of the smaller group."""
        means, counts, within = _moments(features, labels)
        if not len(means):
            return []
        total = float(counts.sum())
        grand_mean = counts @ means / total
        whitener = decompose(means - grand_mean, counts, within, self.max_iterations).whitener
        found, relative = [], []
        for group in label_groups(features, labels):
            count = len(group.rows)
            # Poison would hide behind the variance that it adds.
            own = _whitened_by_others(group.centred @ whitener, total)
            statistic, smaller, odds = _split(own, (group.mean - grand_mean) @ whitener)
            found.append((LabelTest(group.label, count, smaller, statistic, anomaly=0.0), group.rows, odds))
            relative.append(statistic / _of_one_group(count, int(total) - count, whitener.shape[1]))
        anomalies = _anomalies(means.new_tensor(relative)).tolist()
        return [
            (test._replace(anomaly=anomaly), rows, odds)
            for (test, rows, odds), anomaly in zip(found, anomalies, strict=True)
        ]


def _moments(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean features of the labels, images per label and the scatter within labels."""
    means: list[Tensor] = []
    counts: list[int] = []
    within = torch.zeros(())
    for group in label_groups(features, labels):
        within = within.to(group.mean) + group.centred.T @ group.centred
        means.append(group.mean)
        counts.append(len(group.rows))
    if not means:
        return torch.zeros(0), torch.zeros(0), within
    return torch.stack(means), means[0].new_tensor(counts), within


def _whitened_by_others(own: Tensor, total: float) -> Tensor:
    """Return a label's features ``(n, r)``, of mean 0, scaled by the covariance of the other labels' images.

    In the coordinates in which that of all ``total`` images is the identity.
    """
    others = total - len(own)
    if not others:
        return own
    identity = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
    root = torch.linalg.cholesky((total * identity - own.T @ own) / others)
    scaled: Tensor = torch.linalg.solve_triangular(root, own.T, upper=False).T
    return scaled


def _split(centred: Tensor, mean: Tensor) -> tuple[float, int, Tensor]:
    """Return J, size and members' log-odds of the smaller of two groups of whitened features ``(n, r)``, of mean 0.

    The hyperplane starts across each of the three main directions, where it cuts best; the best end is taken.
    """
    count = len(centred)
    best, smaller, odds = 0.0, 0, centred.new_zeros(count)
    for along in principal_components(centred, count=3).unbind(dim=1):
        members = best_cut(along)
        for _ in range(_MOST_STEPS):
            size = int(members.sum())
            if size in (0, count):
                break
            first = members.to(centred) @ centred / size
            second = first * size / (size - count)  # the mean of all is 0
            difference = first - second
            log_odds = centred @ difference - (first + second) @ difference / 2
            if torch.equal(log_odds > 0, members):
                break
            members = log_odds > 0
        else:
            size = 0
        if size in (0, count):
            continue
        statistic = size * (count - size) / count * float(difference @ difference)
        if statistic > best:
            # Of two groups of equal size the one farther from the other labels counts as the smaller.
            is_first = 2 * size < count or (2 * size == count and bool(mean @ difference > 0))
            best, smaller, odds = statistic, min(size, count - size), log_odds if is_first else -log_odds
    return best, smaller, odds


def _of_one_group(count: int, others: int, dimensions: int) -> float:
    """Return about how large J is for the two halves of one normal distribution.

    Halving a normal distribution explains 2/pi of its variance along the cut, and the largest variance of ``count``
    samples in ``dimensions``, relative to that of ``others``, is that by which such random matrices' spectra end.
    """
    own, rest = dimensions / count, dimensions / others if others else 0.0
    edge = ((1 + (own + rest - own * rest) ** 0.5) / (1 - rest)) ** 2
    return float(2 / math.pi * count * edge)


def _anomalies(values: Tensor) -> Tensor:
    """Return the distances from the median in robust standard deviations."""
    distances = values - values.quantile(0.5)
    return distances / (1.4826 * distances.abs().quantile(0.5)).clamp_min(_LEAST_SPREAD)
