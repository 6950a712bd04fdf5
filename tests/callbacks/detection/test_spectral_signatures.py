"""Spectral signatures against a singular value decomposition in float64."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_bd.callbacks.detection.spectral_signatures import SpectralSignatures


def draw(images: int = 90, dimensions: int = 7, labels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, dimensions, generator=generator) + 5 * torch.randn(
        1, dimensions, generator=generator
    )
    return features, torch.arange(images) % labels


def score(features: Tensor, labels: Tensor) -> Tensor:
    return SpectralSignatures().score(features, labels)


@pytest.mark.parametrize("dimensions", [7, 50])
def test_equals_the_formula(dimensions: int) -> None:
    features, labels = draw(dimensions=dimensions)
    expected = np.zeros(len(features))
    for label in range(3):
        own = (labels == label).numpy()
        centred = features.double().numpy()[own]
        centred = centred - centred.mean(axis=0)
        expected[own] = (centred @ np.linalg.svd(centred)[2][0]) ** 2
    scores = score(features, labels)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_finds_planted_images() -> None:
    features, labels = draw(1000, 16, 5)
    poisoned = torch.zeros(1000, dtype=torch.bool)
    poisoned[2:82:5] = True
    features[poisoned] += 3.0
    assert roc_auc_score(poisoned, score(features, labels)) > 0.98


def test_no_label_of_a_clean_set_stands_out() -> None:
    features, labels = draw(5000, 16, 5)
    scores = score(features, labels)
    of_labels = torch.stack([scores[labels == label].mean() for label in range(5)])
    assert of_labels.max() < 1.2 * of_labels.min()


def test_follows_the_order_of_the_images() -> None:
    features, labels = draw()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(score(features[order], labels[order]), score(features, labels)[order])


def test_rotation_shift_and_scale() -> None:
    features, labels = draw()
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2)))[0]
    expected = 4 * score(features, labels)
    torch.testing.assert_close(score(2 * features @ rotation + 3, labels), expected, rtol=1e-4, atol=1e-4)


def test_only_the_partition_matters() -> None:
    features, labels = draw()
    assert torch.equal(score(features, torch.tensor([400, -3, 17])[labels]), score(features, labels))


def test_few_images_and_constant_features_score_zero() -> None:
    features, labels = draw()
    labels[[0, 5]] = torch.tensor([8, 9])
    features[labels == 1] = 0.3
    scores = score(features, labels)
    assert not scores[[0, 5]].any()
    assert not scores[labels == 1].any()
    assert (scores[labels == 0] > 0).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu() -> None:
    features, labels = draw()
    found = score(features.cuda(), labels)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), score(features, labels))


def test_what_the_base_refuses() -> None:
    features, labels = draw()
    with pytest.raises(ValueError, match="at least one"):
        score(features[:0], labels[:0])
    features[3] = torch.nan
    with pytest.raises(ValueError, match="those of 1 of 90 images hold NaN"):
        score(features, labels)
