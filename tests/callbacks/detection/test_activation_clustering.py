"""Activation clustering against scikit-learn's ICA and silhouettes, and all partitions."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import roc_auc_score, silhouette_samples
from torch import Tensor

from lightning_bd.callbacks.detection.activation_clustering import ActivationClustering, Reduction


def draw(images: int, dimensions: int, labels: int, poisoned: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return normal features; the first images of label 1 are shifted."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, dimensions, generator=generator) * torch.linspace(0.5, 1.5, dimensions)
    classes = torch.arange(images) % labels
    features += 4 * torch.randn(labels, dimensions, generator=generator)[classes]
    features[1 : poisoned * labels + 1 : labels] += shift / dimensions**0.5
    return features, classes


def suspicion(reduced: np.ndarray, smaller: np.ndarray) -> Tensor:
    small, large = reduced[smaller].mean(axis=0), reduced[~smaller].mean(axis=0)
    nearer = np.linalg.norm(reduced - large, axis=1) - np.linalg.norm(reduced - small, axis=1)
    silhouette = float(silhouette_samples(reduced, smaller).mean())
    return torch.from_numpy(max(silhouette, 0.0) * (1 + nearer / np.linalg.norm(small - large) / 2))


def test_is_invariant_to_the_rotation_that_ica_adds() -> None:
    features, labels = draw(300, 12, 1, poisoned=60, shift=10.0)
    # Latent variables that are not normal, so that the reference converges.
    features[:, :5] += torch.rand(300, 5, generator=torch.Generator().manual_seed(3)) * 8
    ica = FastICA(n_components=6, whiten="unit-variance", random_state=0, max_iter=5000, tol=1e-4)
    reduced = ica.fit_transform(features.double().numpy())
    poisoned = np.zeros(300, dtype=bool)
    poisoned[1:61] = True
    found = ActivationClustering(dimensions=6).score(features, labels)
    torch.testing.assert_close(found.double(), suspicion(reduced, poisoned), rtol=1e-4, atol=1e-5)


def test_pca_equals_the_formula() -> None:
    features, labels = draw(120, 12, 1, poisoned=20, shift=12.0)
    reduced = PCA(n_components=4).fit_transform(features.double().numpy())
    poisoned = np.zeros(120, dtype=bool)
    poisoned[1:21] = True
    found = ActivationClustering("pca", dimensions=4).score(features, labels)
    torch.testing.assert_close(found.double(), suspicion(reduced, poisoned), rtol=1e-4, atol=1e-5)


def test_clusters_are_the_best_of_all_partitions() -> None:
    for seed in range(5):
        features = torch.randn(11, 2, generator=torch.Generator().manual_seed(seed))
        reduced = PCA(n_components=2).fit_transform(features.double().numpy())

        def inertia(cut: tuple[bool, ...], reduced: np.ndarray = reduced) -> float:
            parts = reduced[np.array(cut)], reduced[~np.array(cut)]
            return sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in parts if len(part))

        best = np.array(min(itertools.product((False, True), repeat=11), key=inertia))
        smaller = best if best.sum() < 6 else ~best
        found = ActivationClustering("pca", dimensions=2).score(features, torch.zeros(11, dtype=torch.int64))
        torch.testing.assert_close(found.double(), suspicion(reduced, smaller), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["ica", "pca"])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.45])
def test_finds_planted_images(reduction: Reduction, rate: float) -> None:
    features, labels = draw(2400, 24, 3, poisoned=int(800 * rate), shift=10.0)
    poisoned = torch.zeros(2400, dtype=torch.bool)
    poisoned[1 : int(800 * rate) * 3 + 1 : 3] = True
    assert roc_auc_score(poisoned, ActivationClustering(reduction).score(features, labels)) > 0.95


@pytest.mark.parametrize("reduction", ["ica", "pca"])
def test_no_label_of_a_clean_set_stands_out(reduction: Reduction) -> None:
    features, labels = draw(1500, 16, 5)
    scores = ActivationClustering(reduction).score(features, labels)
    of_labels = torch.stack([scores[labels == label].mean() for label in range(5)])
    assert of_labels.max() < 1.4 * of_labels.min()


def test_label_comes_before_cluster() -> None:
    # The poisoned are the larger cluster: the wrong one comes first, then they, then the other labels.
    features, labels = draw(900, 16, 3, poisoned=160, shift=14.0)
    scores = ActivationClustering("pca").score(features, labels)
    poisoned, others = scores[1:481:3], scores[481::3]
    assert others[labels[481::3] == 1].min() > poisoned.max()
    assert poisoned.min() > scores[labels != 1].max()


def test_is_the_same_in_any_order() -> None:
    features, labels = draw(300, 12, 3)
    features[:30:2] = features[30]  # images that are the same
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    detector = ActivationClustering()
    scores = detector.score(features, labels)
    assert torch.equal(detector.score(features[order], labels[order]), scores[order])
    assert torch.equal(detector.score(features, torch.tensor([400, -3, 17])[labels]), scores)


def test_leaves_the_random_state_alone() -> None:
    features, labels = draw(60, 5, 2)
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=True)
    ActivationClustering(seed=3).score(features, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state(legacy=True)) == str(numpy_before)


def test_few_images_and_constant_features_score_zero() -> None:
    features, labels = draw(120, 5, 3)
    labels[[0, 5]] = torch.tensor([8, 9])
    features[labels == 1] = 0.3
    scores = ActivationClustering().score(features, labels)
    assert not scores[[0, 5]].any()
    assert not scores[labels == 1].any()
    assert (scores[labels == 2] > 0).all()


def test_features_in_fewer_dimensions() -> None:
    features, labels = draw(60, 2, 1)
    features = torch.cat([features, features, torch.ones(60, 1)], dim=1)
    torch.testing.assert_close(
        ActivationClustering(dimensions=10).score(features, labels),
        ActivationClustering(dimensions=2).score(features, labels),
    )
    two_values = (torch.arange(60) % 4 == 0).float()[:, None]
    assert (ActivationClustering().score(two_values, labels) == torch.where(two_values[:, 0] > 0, 1.5, 0.5)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu() -> None:
    features, labels = draw(120, 5, 3)
    found = ActivationClustering().score(features.cuda(), labels)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), ActivationClustering().score(features, labels))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`reduction` to be one of \('ica', 'pca'\), but got 'svd'"):
        ActivationClustering("svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`dimensions` to be a positive integer, but got 0"):
        ActivationClustering(dimensions=0)


def test_settings_are_kept_apart() -> None:
    assert len({ActivationClustering(*settings).state_key for settings in (("ica", 10), ("pca", 10), ("ica", 5))}) == 3
