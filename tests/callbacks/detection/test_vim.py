"""ViM against pytorch-ood and its formula by a singular value decomposition."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.vim import ViM

CLASSES, WIDTH = 3, 8


def head() -> Head:
    generator = torch.Generator().manual_seed(42)
    return Head(torch.randn(CLASSES, WIDTH, generator=generator), torch.randn(CLASSES, generator=generator))


def data(seed: int = 0, count: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, WIDTH, generator=generator) * torch.linspace(3, 0.5, WIDTH) + 1.0
    logits = features @ head().weight.T + head().bias
    return features, logits, logits.argmax(dim=1)


def by_formula(queries: Tensor, dimension: int) -> Tensor:
    features, logits, _ = data()
    weight, bias = (tensor.double().numpy() for tensor in head())
    origin = -np.linalg.lstsq(weight, bias)[0]
    centred = features.double().numpy() - origin
    principal = np.linalg.svd(centred, full_matrices=False)[2][:dimension]

    def residual(values: np.ndarray) -> np.ndarray:
        left: np.ndarray = np.linalg.norm(values - values @ principal.T @ principal, axis=1)
        return left

    alpha = logits.double().numpy().max(axis=1).sum() / residual(centred).sum()
    values = queries.double().numpy()
    energy = np.log(np.exp(values @ weight.T + bias).sum(axis=1))
    return torch.from_numpy(alpha * residual(values - origin) - energy).float()


def fitted(dimension: int | None = None, max_samples: int = 50_000) -> ViM:
    detector = ViM(dimension, max_samples)
    detector.fit(*data(), head())
    return detector


@pytest.mark.parametrize("dimension", [1, 4, 7, None])
def test_is_the_formula(dimension: int | None) -> None:
    queries, logits, _ = data(seed=1)
    scores = fitted(dimension).score(queries, logits)
    assert scores.dtype == torch.float32
    # The paper's default for few features is half of them.
    torch.testing.assert_close(scores, by_formula(queries, dimension or 4), rtol=1e-5, atol=1e-5)


def test_agrees_with_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    features, _, labels = data()
    other = detectors.ViM(None, d=3, w=head().weight, b=head().bias).fit_features(features, labels)
    queries, logits, _ = data(seed=1)
    torch.testing.assert_close(fitted(3).score(queries, logits), other.predict_features(queries), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "expected"), [(6, 3), (767, 383), (768, 512), (2047, 512), (2048, 1000)])
def test_default_dimension_is_the_paper_s(width: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any orthonormal directions do, and finding them takes long.
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (torch.ones(len(matrix)), torch.eye(len(matrix)).double()))
    detector = ViM()
    features = torch.ones(2, width)
    detector.fit(features, features[:, :2], torch.tensor([0, 1]), Head(torch.eye(2, width), torch.zeros(2)))
    assert detector.fitted["residual"].shape == (width, width - expected)


def test_batches_give_what_all_at_once_gives() -> None:
    streaming = ViM()
    streaming.begin_fit(head())
    for parts in zip(*(torch.split(tensor, 17) for tensor in data()), strict=True):
        streaming.update_fit(*parts)
    streaming.finish_fit()
    queries, logits, _ = data(seed=1)
    torch.testing.assert_close(streaming.score(queries, logits), fitted().score(queries, logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 16, 120])
def test_more_images_than_are_kept(size: int) -> None:
    features, logits, labels = data()
    detector = ViM(max_samples=40)
    detector.begin_fit(head())
    for parts in zip(*(torch.split(tensor, size) for tensor in (features, logits, labels)), strict=True):
        detector.update_fit(*parts)
        assert sum(map(len, detector._kept)) <= 40
    detector.finish_fit()
    # Every fourth of 120, 30 in all: every second would be 60.
    full = fitted()
    residual = (features[::4].double() - full.fitted["origin"]) @ full.fitted["residual"]
    alpha = logits[::4].amax(dim=1).double().sum() / residual.norm(dim=1).sum()
    torch.testing.assert_close(detector.fitted["alpha"], alpha)
    torch.testing.assert_close(detector.fitted["origin"], full.fitted["origin"])
    assert float(detector.fitted["alpha"]) == pytest.approx(float(full.fitted["alpha"]), rel=0.3)
    assert not torch.equal(detector.fitted["alpha"], full.fitted["alpha"])


def test_virtual_logit_is_as_large_as_the_largest_on_average() -> None:
    features, logits, _ = data()
    virtual = fitted().score(features, logits) + logits.logsumexp(dim=1)
    assert float(virtual.mean()) == pytest.approx(float(logits.amax(dim=1).mean()), rel=1e-5)


def test_state_travels() -> None:
    detector, other = fitted(), ViM()
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    queries, logits, _ = data(seed=1)
    assert torch.equal(other.score(queries, logits), detector.score(queries, logits))
    assert all(not tensor.requires_grad for tensor in detector.fitted.values())


def test_needs_no_gradient() -> None:
    features, logits, labels = data()
    weight, bias = head()
    detector = ViM()
    detector.fit(
        features.requires_grad_(), logits.requires_grad_(), labels, Head(weight.requires_grad_(), bias.requires_grad_())
    )
    assert not any(tensor.requires_grad for tensor in detector.fitted.values())


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"Expected argument `dimension` to be a positive integer or None, but got 0\."
    ):
        ViM(dimension=0)
    with pytest.raises(
        ValueError, match=r"Expected argument `max_samples` to be an integer of at least 2, but got 1\."
    ):
        ViM(max_samples=1)
    features, logits, labels = data()
    with pytest.raises(ValueError, match="`ViM` needs the model's last linear layer"):
        ViM().fit(features, logits, labels)
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        ViM().fit(features[:0], logits[:0], labels[:0], head())
    with pytest.raises(ValueError, match=r"`dimension` to be in \[1, D\) for D = 8 features, but got 8"):
        ViM(dimension=WIDTH).fit(features, logits, labels, head())
    flat = Head(head().weight, torch.zeros(CLASSES))
    features[:, 3:] = 0.0
    with pytest.raises(ValueError, match=r"lie in a subspace of 3 dimensions, .* beside 3 principal ones"):
        ViM(dimension=3).fit(features, logits, labels, flat)
    ViM(dimension=2).fit(features, logits, labels, flat)
    with pytest.raises(RuntimeError, match="has to be fitted before it can score"):
        ViM().score(features, logits)
