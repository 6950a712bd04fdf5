"""Streaming sums against NumPy in float64."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection import moments
from lightning_bd.callbacks.detection.moments import ClassSums, Gaussians, GaussianSums, in_double, whitening


def test_class_sums_are_those_of_each_class() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 3, generator=generator)
    labels = torch.randint(4, (50,), generator=generator)
    sums = ClassSums()
    for part, own in zip(torch.split(features, 7), torch.split(labels, 7), strict=True):
        sums.update(part, own, num_classes=5)
    counts, totals = sums.finish()
    assert counts.tolist() == [int((labels == c).sum()) for c in range(5)]
    for label in range(5):
        expected = features[labels == label].numpy().astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(totals[label].numpy(), expected, rtol=0, atol=1e-13)


def test_covariances_survive_a_mean_that_is_large_beside_the_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    # float32 resolves 2**-6 at 1e5: the features are multiples of it.
    features = 1e5 + torch.randint(-64, 64, (400, 6), generator=generator) / 64
    labels = torch.arange(400) % 3
    sums = GaussianSums()
    for part, own in zip(torch.split(features, 33), torch.split(labels, 33), strict=True):
        sums.update(part, own, num_classes=3)
    sums.update(features[:0], labels[:0], num_classes=3)
    found = sums.finish()
    values = features.double().numpy() - 1e5
    means = np.stack([values[labels.numpy() == label].mean(axis=0) for label in range(3)])
    centred = values - means[labels.numpy()]
    np.testing.assert_allclose(found.means.numpy() - 1e5, means, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.within.numpy(), centred.T @ centred / 400, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.total.numpy(), np.cov(values.T, bias=True), rtol=0, atol=1e-9)
    assert float(found.mean_square) == pytest.approx(float(features.double().square().sum(dim=1).mean()), rel=1e-12)


def test_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(90, 4, generator=generator).cumsum(dim=0), torch.arange(90) % 3
    own = threading.local()
    barrier, given = threading.Barrier(3), [torch.empty(0)] * 3

    def sum_over_threads(tensor: Tensor) -> Tensor:
        given[own.rank] = tensor
        barrier.wait(timeout=10)
        total = torch.stack(given).sum(dim=0)
        barrier.wait(timeout=10)
        return total

    def work(rank: int, start: int, stop: int) -> Gaussians:
        own.rank = rank
        sums = GaussianSums()
        sums.update(features[start:stop], labels[start:stop], num_classes=3)
        return sums.finish()

    whole = GaussianSums()
    whole.update(features, labels, num_classes=3)
    expected = whole.finish()
    monkeypatch.setattr(moments, "sum_over_processes", sum_over_threads)
    with ThreadPoolExecutor(3) as pool:
        # The last one's batch is empty.
        parts = list(pool.map(work, range(3), (0, 20, 90), (20, 90, 90)))
    for part in parts:
        for found, reference in zip(part, expected, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-11)


def test_whitening_is_a_root_of_the_pseudo_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    covariance = root @ root.T
    matrix = whitening(covariance, rtol=1e-10, mean_square=covariance.trace())
    assert matrix.shape == (6, 4)
    torch.testing.assert_close(matrix @ matrix.T, torch.linalg.pinv(covariance, hermitian=True), rtol=1e-9, atol=1e-9)


def test_whitening_leaves_out_what_hardly_varies() -> None:
    covariance = torch.diag(torch.tensor([1.0, 1e-3, 1e-5]).double())
    one = torch.tensor(1.0)
    assert [whitening(covariance, rtol, one).shape[1] for rtol in (0.0, 1e-4, 1e-2)] == [3, 2, 1]
    # Rounding of features of length 1e4 is larger than the smallest variance.
    assert whitening(covariance, 0.0, torch.tensor(1e10)).shape[1] == 2


def test_features_that_do_not_vary() -> None:
    sums = GaussianSums()
    sums.update(torch.full((8, 3), 0.1), torch.arange(8) % 2, num_classes=2)
    found = sums.finish()
    for covariance in (found.within, found.total):
        with pytest.raises(ValueError, match="Expected features that vary, but those of the fit data do not"):
            whitening(covariance, 1e-10, found.mean_square)


def test_no_gradient_is_kept() -> None:
    sums = GaussianSums()
    sums.update(torch.rand(8, 3, requires_grad=True), torch.arange(8) % 2, num_classes=2)
    assert not any(tensor.requires_grad for tensor in sums.finish())


def test_double_where_the_device_has_it() -> None:
    tensor = torch.ones(2)
    assert in_double(tensor).dtype == torch.float64
    assert in_double(tensor).device == tensor.device


@pytest.mark.parametrize("label", [-1, 3])
def test_label_that_is_no_class_of_the_model(label: int) -> None:
    with pytest.raises(ValueError, match=rf"Expected labels in \[0, 3\), as many as .* but got {label}\."):
        ClassSums().update(torch.ones(2, 2), torch.tensor([0, label]), num_classes=3)


def test_classes_without_images_are_named() -> None:
    sums = GaussianSums()
    sums.update(torch.rand(4, 2), torch.tensor([1, 1, 3, 3]), num_classes=20)
    with pytest.raises(
        ValueError, match=r"each of the 20 classes, but got none of class 0, 2, 4, .*, 11, \.\.\.: fit on"
    ):
        sums.finish()


def test_no_data() -> None:
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        GaussianSums().finish()
    sums = GaussianSums()
    sums.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), num_classes=3)
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        sums.finish()
