"""The decomposition against likelihoods that scipy computes."""

import numpy as np
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from lightning_bd.callbacks.detection.decomposition import decompose


def draw(images: int, dimensions: int, labels: int, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, dimensions, generator=generator) * torch.linspace(0.5, 1.5, dimensions)
    classes = torch.arange(images) % labels
    return features + spread * torch.randn(labels, dimensions, generator=generator)[classes], classes


def covariances(features: Tensor, labels: Tensor, max_iterations: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Return S_mu and S_eps of features that vary in all dimensions."""
    own = [features[labels == label].double() for label in torch.arange(int(labels.max()) + 1)]
    means = torch.stack([part.mean(dim=0) for part in own]) - features.double().mean(dim=0)
    within = sum(((part - part.mean(dim=0)).T @ (part - part.mean(dim=0)) for part in own), torch.zeros(()))
    counts = torch.tensor([len(part) for part in own]).double()
    whitener, ratios = decompose(means, counts, within, max_iterations)
    inverse = torch.linalg.inv(whitener).numpy()
    return inverse.T @ np.diag(ratios) @ inverse, inverse.T @ inverse


def log_likelihood(features: Tensor, labels: Tensor, of_labels: np.ndarray, of_images: np.ndarray) -> float:
    """Return the likelihood of all images of each label together, without the formula's hidden parts."""
    centred = (features.double() - features.double().mean(dim=0)).numpy()
    total = 0.0
    for label in torch.arange(int(labels.max()) + 1):
        own = centred[(labels == label).numpy()]
        joint = np.kron(np.eye(len(own)), of_images) + np.kron(np.ones((len(own), len(own))), of_labels)
        total += float(multivariate_normal(cov=joint).logpdf(own.ravel()))
    return total


def test_covariances_are_the_most_likely() -> None:
    features, labels = draw(80, 2, 8)
    labels[:20] = 0  # not all of one size
    of_labels, of_images = covariances(features, labels)
    best = log_likelihood(features, labels, of_labels, of_images)
    random = np.random.default_rng(0)
    for size in (0.02, 0.1):
        for _ in range(10):
            left, right = (np.eye(2) + size * random.standard_normal((2, 2)) for _ in range(2))
            assert log_likelihood(features, labels, left @ of_labels @ left.T, of_images) < best
            assert log_likelihood(features, labels, of_labels, right @ of_images @ right.T) < best


def test_every_iteration_is_more_likely() -> None:
    features, labels = draw(36, 2, 12, spread=0.5)
    steps = [log_likelihood(features, labels, *covariances(features, labels, count)) for count in (1, 2, 3, 500)]
    assert steps[0] < steps[1] < steps[2] < steps[3]
    assert steps[3] - steps[0] > 0.01


def test_recovers_covariances() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16000) % 2000
    one, two = (torch.randn(3, 3, generator=generator) for _ in range(2))
    features = (
        torch.randn(2000, 3, generator=generator)[labels] @ one + torch.randn(16000, 3, generator=generator) @ two
    )
    of_labels, of_images = covariances(features, labels)
    np.testing.assert_allclose(of_images, (two.T @ two).numpy(), atol=0.1)
    np.testing.assert_allclose(of_labels, (one.T @ one).numpy(), atol=0.5)


def test_directions_without_variance_are_left_out() -> None:
    means, counts = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]).double(), torch.tensor([50.0, 50.0]).double()
    whitener, ratios = decompose(means, counts, torch.diag(torch.tensor([100.0, 50.0, 0.0])).double())
    assert whitener.shape == (3, 2)
    assert not whitener[2].any()
    assert ratios.shape == (2,)
    nothing = decompose(torch.zeros(2, 3).double(), counts, torch.zeros(3, 3).double())
    assert nothing.whitener.shape == (3, 0)


def test_no_more_directions_than_images_allow() -> None:
    within = torch.diag(torch.arange(1.0, 31.0)).double()
    for counts, directions in (([100.0, 150.0, 60.0], 16), ([250.0], 25), ([12.0, 900.0], 1), ([400.0, 400.0], 30)):
        found = decompose(torch.zeros(len(counts), 30).double(), torch.tensor(counts).double(), within)
        assert found.whitener.shape == (30, directions)
        assert found.whitener[30 - directions :].any(dim=1).all()
