"""SCAn against likelihoods that scipy computes."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_bd.callbacks.detection.decomposition import decompose
from lightning_bd.callbacks.detection.scan import SCAn

THRESHOLD = float(np.exp(2))


def draw(images: int, dimensions: int, labels: int, poisoned: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return normal features; the first images of label 1 are shifted."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, dimensions, generator=generator) * torch.linspace(0.5, 1.5, dimensions)
    classes = torch.arange(images) % labels
    features += 4 * torch.randn(labels, dimensions, generator=generator)[classes]
    features[1 : poisoned * labels + 1 : labels] += shift / dimensions**0.5
    return features, classes


def covariance(features: Tensor, labels: Tensor) -> np.ndarray:
    """Return S_eps of features that vary in all dimensions."""
    own = [features[labels == label].double() for label in torch.arange(int(labels.max()) + 1)]
    means = torch.stack([part.mean(dim=0) for part in own]) - features.double().mean(dim=0)
    within = sum(((part - part.mean(dim=0)).T @ (part - part.mean(dim=0)) for part in own), torch.zeros(()))
    counts = torch.tensor([len(part) for part in own]).double()
    whitener = decompose(means, counts, within).whitener
    found: np.ndarray = torch.linalg.inv(whitener @ whitener.T).numpy()
    return found


def covariance_of_others(features: Tensor, labels: Tensor, label: int) -> np.ndarray:
    """Return S_eps without what the label's own images add to it."""
    of_images = covariance(features, labels)
    own = features[labels == label].double().numpy()
    scatter = np.cov(own.T, bias=True) * len(own)
    others: np.ndarray = (len(features) * of_images - scatter) / (len(features) - len(own))
    return others


def test_statistic_is_the_likelihood_ratio() -> None:
    features, labels = draw(150, 3, 5, poisoned=8, shift=12.0)
    of_images = covariance_of_others(features, labels, 1)
    found = SCAn().label_tests(features, labels)[1]
    assert (found.label, found.images, found.smaller) == (1, 30, 8)
    own = features[labels == 1].double().numpy()

    def likelihood(part: np.ndarray) -> float:
        return float(multivariate_normal(part.mean(axis=0), of_images).logpdf(part).sum())

    assert found.statistic == pytest.approx(2 * (likelihood(own[:8]) + likelihood(own[8:]) - likelihood(own)), rel=1e-6)


def test_split_is_the_best_of_all() -> None:
    features, labels = draw(60, 2, 5)
    for found in SCAn().label_tests(features, labels):
        of_images = covariance_of_others(features, labels, found.label)
        whitener = torch.from_numpy(np.linalg.cholesky(np.linalg.inv(of_images)))
        own = features[labels == found.label].double() @ whitener
        best = 0.0
        # Of the two sides of every cut one holds the last image.
        for cut in range(1, 2**11):
            first = torch.tensor([bool(cut >> image & 1) for image in range(12)])
            difference = own[first].mean(dim=0) - own[~first].mean(dim=0)
            size = int(first.sum())
            best = max(best, size * (12 - size) / 12 * float(difference @ difference))
        assert found.statistic <= best * (1 + 1e-9)
        assert found.statistic > 0.9 * best


def test_score_is_the_formula() -> None:
    features, labels = draw(150, 3, 5, poisoned=8, shift=12.0)
    of_images = covariance_of_others(features, labels, 1)
    scores = SCAn().score(features, labels)
    own = features[labels == 1].double().numpy()
    small, large = (multivariate_normal(part.mean(axis=0), of_images).logpdf(own) for part in (own[:8], own[8:]))
    tests = SCAn().label_tests(features, labels)
    odds = small - large
    expected = np.log1p(np.exp(tests[1].anomaly)) * (1 + odds / (1 + np.abs(odds)) / 2)
    np.testing.assert_allclose(scores[labels == 1].double(), expected, rtol=1e-5)
    for found in tests:
        relative = scores[labels == found.label] / np.log1p(np.exp(found.anomaly))
        assert 0.5 < relative.min() < 1 < relative.max() < 1.5
    statistics = np.array([test.statistic for test in tests])
    distances = statistics - np.median(statistics)  # all labels have equally many images
    anomalies = distances / (1.4826 * np.median(np.abs(distances)))
    np.testing.assert_allclose([test.anomaly for test in tests], anomalies, rtol=1e-9)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.45])
def test_finds_planted_images(rate: float) -> None:
    features, labels = draw(1600, 32, 8, poisoned=int(200 * rate), shift=8.0)
    poisoned = torch.zeros(1600, dtype=torch.bool)
    poisoned[1 : int(200 * rate) * 8 + 1 : 8] = True
    assert roc_auc_score(poisoned, SCAn().score(features, labels)) > 0.99
    assert [test.label for test in SCAn().label_tests(features, labels) if test.anomaly > THRESHOLD] == [1]


@pytest.mark.parametrize("images", [20, 400])
def test_no_label_of_a_clean_set_stands_out(images: int) -> None:
    features, labels = draw(3200, 32, 8)
    kept = (labels != 2) | (torch.arange(3200) < images * 8)
    tests = SCAn().label_tests(features[kept], labels[kept])
    assert [test.images for test in tests] == [400, 400, images, 400, 400, 400, 400, 400]
    assert max(test.anomaly for test in tests) < THRESHOLD


def test_a_wide_direction_does_not_hide_a_group() -> None:
    features = torch.randn(1600, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(1600) % 4
    features[labels == 1, 0] *= 5**0.5
    features[1:81:4, 1] += 8.5
    found = SCAn().label_tests(features, labels)[1]
    assert found.smaller == 20
    assert found.anomaly > THRESHOLD


def test_label_comes_before_group() -> None:
    features, labels = draw(1600, 16, 8, poisoned=120, shift=8.0)
    scores = SCAn().score(features, labels)
    poisoned = scores[1:961:8]
    assert scores[961::8].min() > poisoned.max()
    assert poisoned.min() > scores[labels != 1].max()


def test_follows_the_order_of_the_images() -> None:
    features, labels = draw(400, 12, 4, poisoned=10, shift=6.0)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(SCAn().score(features[order], labels[order]), SCAn().score(features, labels)[order])
    assert torch.equal(SCAn().score(features, labels), SCAn().score(features, labels))


def test_only_the_partition_matters() -> None:
    features, labels = draw(400, 12, 4)
    expected = SCAn().score(features, labels)
    renamed = SCAn().score(features, torch.tensor([400, 500, 600, 700])[labels])
    assert torch.equal(renamed, expected)
    torch.testing.assert_close(SCAn().score(features, torch.tensor([7, -3, 5, 1000])[labels]), expected)


def test_linear_maps_change_nothing() -> None:
    features, labels = draw(400, 12, 4, poisoned=10, shift=6.0)
    mapping = torch.randn(12, 12, generator=torch.Generator().manual_seed(2)).double()
    mapped = torch.cat([(features.double() @ mapping).float() + 3, torch.ones(400, 2)], dim=1)
    torch.testing.assert_close(SCAn().score(mapped, labels), SCAn().score(features, labels), rtol=1e-3, atol=1e-3)


def test_groups_of_equal_size() -> None:
    features = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) / 10
    labels = torch.arange(60) % 3
    features[labels == 0] += torch.tensor([9.0, 0.0])
    features[0:30:3] += torch.tensor([9.0, 0.0])
    for sign in (1, -1):
        scores = SCAn().score(sign * features, labels)
        assert scores[0:30:3].min() > scores[30::3].max()


def test_few_images_score_zero_and_are_not_counted() -> None:
    features, labels = draw(200, 6, 4)
    more, other = torch.full((3, 6), 1e3), torch.tensor([8, 9, 9])
    scores = SCAn().score(torch.cat([features, more]), torch.cat([labels, other]))
    assert torch.equal(scores[:200], SCAn().score(features, labels))
    assert not scores[200:].any()
    assert not SCAn().score(features[:8], labels[:8]).any()
    assert SCAn().label_tests(features[:8], labels[:8]) == []


def test_degenerate_features() -> None:
    labels = torch.arange(60) % 3
    constant = SCAn().score(torch.full((60, 4), 0.1), labels)
    assert constant.isfinite().all()
    assert constant.min() == constant.max()
    # Labels without any spread, one of which has some.
    features = torch.nn.functional.one_hot(labels, 3).float()
    assert SCAn().score(features, labels).isfinite().all()
    features[0:12:3, 1] = 1.0
    scores = SCAn().score(features, labels)
    assert sorted(scores.topk(4).indices.tolist()) == [0, 3, 6, 9]
    # More dimensions than images, and one label.
    wide, classes = draw(60, 200, 3, poisoned=4, shift=60.0)
    assert sorted(SCAn().score(wide, classes).topk(4).indices.tolist()) == [1, 4, 7, 10]
    assert SCAn().score(wide, torch.zeros(60, dtype=torch.int64)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu() -> None:
    features, labels = draw(400, 12, 4, poisoned=10, shift=6.0)
    found = SCAn().score(features.cuda(), labels)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), SCAn().score(features, labels), rtol=1e-4, atol=1e-4)


def test_bad_iterations() -> None:
    with pytest.raises(ValueError, match="`max_iterations` to be a positive integer, but got 0"):
        SCAn(max_iterations=0)
