"""The Mahalanobis distance against scikit-learn, pytorch-ood and its formula."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor

from lightning_bd.callbacks.detection.mahalanobis import Mahalanobis

CLASSES, WIDTH = 3, 5


def data(seed: int = 0, count: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % CLASSES
    centres = 4.0 * torch.eye(CLASSES, WIDTH)
    features = (centres[labels] + torch.randn(count, WIDTH, generator=generator)) @ mix
    return features, torch.zeros(count, CLASSES), labels


def by_scikit_learn(queries: Tensor) -> Tensor:
    """As the authors' code: scikit-learn's precision of what is left after the class means."""
    features, _, labels = (tensor.double().numpy() for tensor in data())
    means = np.stack([features[labels == label].mean(axis=0) for label in range(CLASSES)])
    precision = EmpiricalCovariance(assume_centered=True).fit(features - means[labels.astype(int)]).precision_
    deviations = queries.double().numpy()[:, None] - means
    return torch.from_numpy(np.einsum("bkd,de,bke->bk", deviations, precision, deviations).min(axis=1)).float()


def fitted(rtol: float = 1e-10) -> Mahalanobis:
    detector = Mahalanobis(rtol=rtol)
    detector.fit(*data())
    return detector


def test_is_the_formula() -> None:
    queries, logits, _ = data(seed=1)
    scores = fitted().score(queries, logits)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, by_scikit_learn(queries), rtol=1e-5, atol=1e-5)


def test_agrees_with_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    features, logits, labels = data()
    other = detectors.Mahalanobis(None).fit_features(features, labels)
    queries = data(seed=1)[0]
    # Theirs is half the distance, with a covariance that is not divided by the number of images.
    expected = 2 * len(features) * other.predict_features(queries)
    torch.testing.assert_close(fitted().score(queries, logits), expected, rtol=1e-3, atol=1e-3)


def test_batches_give_what_all_at_once_gives() -> None:
    streaming = Mahalanobis()
    streaming.begin_fit()
    for parts in zip(*(torch.split(tensor, 17) for tensor in data()), strict=True):
        streaming.update_fit(*parts)
    streaming.finish_fit()
    queries, logits, _ = data(seed=1)
    torch.testing.assert_close(streaming.score(queries, logits), fitted().score(queries, logits), rtol=1e-6, atol=0)


def test_linear_maps_and_shifts_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(7)
    matrix, shift = torch.randn(WIDTH, WIDTH, generator=generator), 10 * torch.randn(WIDTH, generator=generator)
    features, logits, labels = data()
    queries = data(seed=1)[0]
    detector = Mahalanobis()
    detector.fit(features @ matrix + shift, logits, labels)
    scores = detector.score(queries @ matrix + shift, logits)
    torch.testing.assert_close(scores, fitted().score(queries, logits), rtol=1e-3, atol=1e-3)


def test_dead_and_repeated_features_do_not_count() -> None:
    features, logits, labels = data()
    queries = data(seed=1)[0]

    def wider(rows: Tensor, dead: float) -> Tensor:
        return torch.cat([rows, torch.full((len(rows), 1), dead)], dim=1)

    detector = Mahalanobis()
    detector.fit(wider(features, 0.0), logits, labels)
    expected = fitted().score(queries, logits)
    for dead in (0.0, 100.0):
        torch.testing.assert_close(detector.score(wider(queries, dead), logits), expected, rtol=1e-5, atol=1e-5)
    assert detector.fitted["whitening"].shape == (WIDTH + 1, WIDTH)
    detector.fit(torch.cat([features, features], dim=1), logits, labels)
    scores = detector.score(torch.cat([queries, queries], dim=1), logits)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_fewer_images_than_features() -> None:
    detector = Mahalanobis()
    features = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    detector.fit(features, torch.zeros(9, CLASSES), torch.arange(9) % CLASSES)
    assert detector.fitted["whitening"].shape == (20, 6)
    assert bool(detector.score(features, torch.zeros(9, CLASSES)).isfinite().all())


def test_class_mean_has_distance_zero_and_unknown_images_score_higher() -> None:
    features, logits, labels = data()
    detector = fitted()
    mean = features[labels == 1].double().mean(dim=0, keepdim=True).float()
    assert float(detector.score(mean, logits[:1])) == pytest.approx(0.0, abs=1e-6)
    known, unknown = detector.score(data(seed=1)[0], logits), detector.score(-3 * data(seed=2)[0], logits)
    assert known.quantile(0.9) < unknown.quantile(0.1)


def test_state_travels() -> None:
    detector, other = fitted(), Mahalanobis()
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    queries, logits, _ = data(seed=1)
    assert torch.equal(other.score(queries, logits), detector.score(queries, logits))


def test_errors() -> None:
    for rtol in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"Expected argument `rtol` to be a float in \[0, 1\), but got {rtol}\."):
            Mahalanobis(rtol=rtol)
    features, logits, labels = data()
    with pytest.raises(ValueError, match="but got none of class 2"):
        Mahalanobis().fit(features[labels < 2], logits[labels < 2], labels[labels < 2])
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        Mahalanobis().fit(features[:0], logits[:0], labels[:0])
    with pytest.raises(ValueError, match="do not, apart from their class"):
        Mahalanobis().fit(torch.eye(CLASSES)[labels], logits, labels)
    with pytest.raises(RuntimeError, match="has to be fitted before it can score"):
        Mahalanobis().score(features, logits)
