"""Means and covariances of features that pass batch by batch, for the detectors that need them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.detection.processes import sum_over_processes

__all__ = ("ClassSums", "GaussianSums", "Gaussians", "in_double", "require_every_class", "require_images", "whitening")

# A variance that is a smaller part of the features' mean square is the rounding of float32 features.
_ROUNDING = 1e-14


class Gaussians(NamedTuple):
    """Normal distributions with one covariance, one for each class, and one for all images together.

    Attributes:
        means: ``(K, D)`` float64, of the classes.
        mean: ``(D,)`` float64, of all images.
        within: ``(D, D)`` float64, covariance about the class means, divided by the number of images.
        total: ``(D, D)`` float64, covariance about the mean, divided by the number of images.
    """

    means: Tensor
    mean: Tensor
    within: Tensor
    total: Tensor

    @property
    def mean_square(self) -> Tensor:
        """Mean squared length of the features."""
        return self.total.trace() + self.mean.square().sum()


def in_double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device, or the CPU where that has no float64.

    Args:
        tensor: Floating.
    """
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def require_images(counts: Tensor) -> None:
    """Check that there are fit data.

    Args:
        counts: ``(K,)``, images of each class.

    Raises:
        ValueError: If there is no image.
    """
    if not bool(counts.any()):
        raise ValueError("Expected clean data to fit on, but got no image.")


def require_every_class(counts: Tensor) -> None:
    """Check that the fit data hold each class.

    Args:
        counts: ``(K,)``, images of each class.

    Raises:
        ValueError: If a class has no image; the message names those classes.
    """
    require_images(counts)
    missing = counts.eq(0).nonzero().flatten().tolist()
    if missing:
        named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"Expected clean data with images of each of the {len(counts)} classes, but got none of class {named}:"
            " fit on a `dataloader` that holds every class."
        )


class ClassSums:
    """Number and sum of each class's features.

    Example:
        >>> sums = ClassSums()
        >>> sums.update(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 2]), num_classes=3)
        >>> counts, totals = sums.finish()
        >>> counts, totals.flatten()
        (tensor([2., 0., 1.], dtype=torch.float64), tensor([4., 0., 5.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._totals: Tensor | None = None

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Take in a batch.

        Args:
            features: ``(B, D)``, floating.
            labels: ``(B,)``, integers in ``[0, num_classes)``.
            num_classes: The same each time.

        Raises:
            ValueError: If a label is out of its range.
        """
        values = in_double(features)
        labels = labels.to(values.device)
        outside = (labels < 0) | (labels >= num_classes)
        if bool(outside.any()):
            raise ValueError(
                f"Expected labels in [0, {num_classes}), as many as the model has logits, but got"
                f" {int(labels[outside][0])}."
            )
        # A product, since adding to rows by index is not deterministic on a GPU.
        members = F.one_hot(labels.long(), num_classes).to(values.dtype)
        counts, totals = members.sum(dim=0), members.T @ values
        self._counts = counts if self._counts is None else self._counts + counts
        self._totals = totals if self._totals is None else self._totals + totals

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return ``(K,)`` counts and ``(K, D)`` sums over all processes, float64.

        Raises:
            ValueError: If there was no batch.
        """
        if self._counts is None or self._totals is None:
            raise ValueError("Expected clean data to fit on, but got no image.")
        return sum_over_processes(self._counts), sum_over_processes(self._totals)


class GaussianSums:
    """What the distributions of the classes' features follow from, in one pass.

    Squares are summed about the running mean, so that nothing is lost where the mean is large beside the deviation.

    Example:
        >>> sums = GaussianSums()
        >>> sums.update(torch.tensor([[1.0], [3.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> found = sums.finish()
        >>> found.means.flatten().tolist(), found.within.item(), found.total.item()
        ([2.0, 6.0], 1.0, 5.0)
    """

    def __init__(self) -> None:
        self._classes = ClassSums()
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Take in a batch.

        Args:
            features: ``(B, D)``, floating.
            labels: ``(B,)``, integers in ``[0, num_classes)``.
            num_classes: The same each time.

        Raises:
            ValueError: If a label is out of its range.
        """
        self._classes.update(features, labels, num_classes)
        if not len(features):
            return
        values = in_double(features)
        mean, count = values.mean(dim=0), len(values)
        centred = values - mean
        scatter = centred.T @ centred
        if self._mean is not None and self._scatter is not None:
            shift = mean - self._mean
            total = self._count + count
            scatter += self._scatter + shift.outer(shift) * (self._count * count / total)
            mean, count = self._mean + shift * (count / total), total
        self._count, self._mean, self._scatter = count, mean, scatter

    def finish(self) -> Gaussians:
        """Return the distributions, over all processes.

        Raises:
            ValueError: If there was no image, or none of some class.
        """
        counts, totals = self._classes.finish()
        require_every_class(counts)
        count = counts.sum()
        means, mean = totals / counts[:, None], totals.sum(dim=0) / count
        # A process whose batches were empty has summed nothing.
        own = mean if self._mean is None else self._mean
        scatter = mean.new_zeros(len(mean), len(mean)) if self._scatter is None else self._scatter
        total = sum_over_processes(scatter + (own - mean).outer(own - mean) * self._count) / count
        spread = means - mean
        within = total - spread.T @ (spread * (counts / count)[:, None])
        return Gaussians(means, mean, within, total)


def whitening(covariance: Tensor, rtol: float, mean_square: Tensor) -> Tensor:
    """Return a matrix that turns features into ones of unit covariance.

    It is a square root of the covariance's pseudo-inverse: directions that hardly vary are left out.

    Args:
        covariance: ``(D, D)`` float64.
        rtol: Eigenvalues up to this part of the largest are left out, in [0, 1).
        mean_square: Mean squared length of the features, to tell variance from rounding.

    Returns:
        ``(D, R)`` float64, R the number of directions: the squared length of ``x @ whitening`` is the squared
        Mahalanobis distance of ``x`` to 0.

    Raises:
        ValueError: If no direction varies.

    Example:
        >>> whitening(torch.diag(torch.tensor([0.0, 4.0]).double()), rtol=1e-10, mean_square=torch.tensor(1.0)).abs()
        tensor([[0.0000],
                [0.5000]], dtype=torch.float64)
    """
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(covariance)
    rounding = _ROUNDING * float(mean_square)
    if float(values[-1]) <= rounding:
        raise ValueError(
            "Expected features that vary, but those of the fit data do not, apart from their class: fit on more images,"
            " or name another `layer`."
        )
    found = values > max(rtol * float(values[-1]), rounding)
    return vectors[:, found] / values[found].sqrt()
