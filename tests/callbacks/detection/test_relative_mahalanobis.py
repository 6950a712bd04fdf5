"""The relative Mahalanobis distance against pytorch-ood and its formula."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection.relative_mahalanobis import RelativeMahalanobis

CLASSES, WIDTH = 3, 5


def data(seed: int = 0, count: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % CLASSES
    centres = 4.0 * torch.eye(CLASSES, WIDTH)
    features = (centres[labels] + torch.randn(count, WIDTH, generator=generator)) @ mix
    return features, torch.zeros(count, CLASSES), labels


def by_formula(queries: Tensor) -> Tensor:
    features, _, labels = (tensor.double().numpy() for tensor in data())
    means = [features[labels == label].mean(axis=0) for label in range(CLASSES)]
    within = sum(np.cov(features[labels == label].T, bias=True) * (labels == label).mean() for label in range(CLASSES))
    precision, background = np.linalg.inv(within), np.linalg.inv(np.cov(features.T, bias=True))
    scores = []
    for query in queries.double().numpy():
        to_classes = [(query - mean) @ precision @ (query - mean) for mean in means]
        to_all = (query - features.mean(axis=0)) @ background @ (query - features.mean(axis=0))
        scores.append(min(to_classes) - to_all)
    return torch.tensor(scores).float()


def fitted() -> RelativeMahalanobis:
    detector = RelativeMahalanobis()
    detector.fit(*data())
    return detector


def test_is_the_formula() -> None:
    queries, logits, _ = data(seed=1)
    scores = fitted().score(queries, logits)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, by_formula(queries), rtol=1e-5, atol=1e-5)


def test_agrees_with_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    features, logits, labels = data()
    other = detectors.RMD(None).fit_features(features, labels)
    queries = data(seed=1)[0]
    # Their covariances are not divided by the number of images.
    expected = len(features) * other.predict_features(queries)
    torch.testing.assert_close(fitted().score(queries, logits), expected, rtol=1e-3, atol=1e-3)


def test_what_tells_no_classes_apart_drops_out() -> None:
    # Classes lie along the first feature; in the second, both covariances are the same.
    features = torch.cartesian_prod(torch.tensor([-6.0, -4.0, 4.0, 6.0]), torch.tensor([-1.0, 1.0]))
    detector = RelativeMahalanobis()
    detector.fit(features, torch.zeros(8, 2), (features[:, 0] > 0).long())
    scores = detector.score(torch.tensor([[5.0, 0.0], [5.0, 50.0], [0.0, 50.0]]), torch.zeros(3, 2))
    # Variances along the first feature are 1 within the classes and 26 in all.
    torch.testing.assert_close(scores, torch.tensor([-25 / 26, -25 / 26, 25.0]), rtol=1e-6, atol=1e-6)


def test_batches_give_what_all_at_once_gives() -> None:
    streaming = RelativeMahalanobis()
    streaming.begin_fit()
    for parts in zip(*(torch.split(tensor, 17) for tensor in data()), strict=True):
        streaming.update_fit(*parts)
    streaming.finish_fit()
    queries, logits, _ = data(seed=1)
    torch.testing.assert_close(streaming.score(queries, logits), fitted().score(queries, logits), rtol=1e-6, atol=1e-6)


def test_linear_maps_and_dead_features_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(WIDTH, WIDTH, generator=generator)
    features, logits, labels = data()
    queries = data(seed=1)[0]
    detector = RelativeMahalanobis()
    dead = torch.zeros(len(features), 1)
    detector.fit(torch.cat([features @ matrix, dead], dim=1), logits, labels)
    scores = detector.score(torch.cat([queries @ matrix, dead + 9.0], dim=1), logits)
    torch.testing.assert_close(scores, fitted().score(queries, logits), rtol=1e-3, atol=1e-3)


def test_state_travels() -> None:
    detector, other = fitted(), RelativeMahalanobis()
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    queries, logits, _ = data(seed=1)
    assert torch.equal(other.score(queries, logits), detector.score(queries, logits))


def test_errors() -> None:
    for rtol in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"Expected argument `rtol` to be a float in \[0, 1\), but got {rtol}\."):
            RelativeMahalanobis(rtol=rtol)
    features, logits, labels = data()
    with pytest.raises(ValueError, match="but got none of class 2"):
        RelativeMahalanobis().fit(features[labels < 2], logits[labels < 2], labels[labels < 2])
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        RelativeMahalanobis().fit(features[:0], logits[:0], labels[:0])
    with pytest.raises(ValueError, match="do not, apart from their class"):
        RelativeMahalanobis().fit(torch.eye(CLASSES)[labels], logits, labels)
    with pytest.raises(RuntimeError, match="has to be fitted before it can score"):
        RelativeMahalanobis().score(features, logits)
