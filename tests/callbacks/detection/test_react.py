"""ReAct against NumPy's percentile and a clipped float64 forward pass."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bd.callbacks.detection import react
from lightning_bd.callbacks.detection.energy import Energy
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.react import ReAct
from lightning_bd.functional.detection import rank_auroc

# The relative width of a bin.
ACCURACY = 2.0**-11


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_head(width: int = 16, classes: int = 4) -> Head:
    return Head(torch.randn(classes, width, generator=generator(1)), torch.randn(classes, generator=generator(2)))


def draw(kind: str = "relu", count: int = 200) -> Tensor:
    values = torch.randn(count, 16, generator=generator(0))
    return {
        "relu": values.relu(),
        "signed": values * 3.0,
        "negative": -values.abs(),
        "wide": (values * 8.0).exp(),
        "equal": torch.full_like(values, 0.3),
        "zero": torch.zeros_like(values),
    }[kind]


def fitted(features: Tensor, percentile: float = 90.0, head: Head | None = None) -> ReAct:
    detector, head = ReAct(percentile), head or make_head()
    detector.fit(features, features @ head.weight.T + head.bias, torch.zeros(len(features)), head)
    return detector


@pytest.mark.parametrize("percentile", [1.0, 50.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("kind", ["relu", "signed", "negative", "wide", "equal", "zero"])
def test_threshold_is_numpys_percentile(kind: str, percentile: float) -> None:
    expected = float(np.percentile(draw(kind).numpy(), percentile))
    threshold = float(fitted(draw(kind), percentile).fitted["threshold"])
    assert threshold == pytest.approx(expected, rel=ACCURACY, abs=1e-38)


def test_values_of_one_bin_lie_evenly() -> None:
    values = 1.0 + (torch.arange(64) + 0.5) / 64 * ACCURACY
    threshold = float(fitted(values.view(4, 16), 30.0).fitted["threshold"])
    assert threshold == pytest.approx(float(np.percentile(values.numpy(), 30.0)), rel=1e-6)


def test_threshold_between_two_values() -> None:
    features = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    head = Head(torch.eye(2), torch.zeros(2))
    threshold = fitted(features, percentile=80.0, head=head).fitted["threshold"]
    assert float(threshold) == pytest.approx(3.0 + 0.4 * 97.0, rel=ACCURACY)


def test_numbers_float32_by_order() -> None:
    values = torch.tensor([-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3e38])
    keys = react._keys(values)
    assert keys.tolist() == sorted(set(keys.tolist()))
    assert int(keys[0]) >= 0
    assert int(keys[-1]) < 2**32
    assert [react._value(int(key)) for key in keys] == values.tolist()


def test_score_is_the_energy_of_clipped_features() -> None:
    detector, head = fitted(draw()), make_head()
    features = draw("signed")
    clipped = features.double().clamp(max=float(detector.fitted["threshold"]))
    expected = -(clipped @ head.weight.double().T + head.bias.double()).exp().sum(dim=1).log()
    scores = detector.score(features, torch.zeros(len(features), 4))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_equals_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    head = make_head()
    theirs = detectors.ReAct(None, lambda maps: maps.flatten(1) @ head.weight.T + head.bias, percentile=0.9)
    theirs.fit_feature_maps(draw()[..., None, None], torch.zeros(200))
    expected = theirs.predict_feature_maps(draw("signed")[..., None, None])
    scores = fitted(draw()).score(draw("signed"), torch.zeros(200, 4))
    torch.testing.assert_close(scores, expected, rtol=5e-3, atol=5e-3)


def test_nothing_above_the_threshold_is_the_plain_energy() -> None:
    features, head = draw("negative"), make_head()
    logits = torch.nn.functional.linear(features, head.weight, head.bias)
    assert torch.equal(fitted(draw()).score(features, logits), Energy().score(features, logits))


@pytest.mark.parametrize("sizes", [[200], [1, 199], [50] * 4, [64, 64, 64, 8]])
def test_batches_do_not_matter(sizes: list[int]) -> None:
    features, detector = draw(), ReAct()
    detector.begin_fit(make_head())
    for part in reversed(torch.split(features, sizes)):
        detector.update_fit(part, torch.zeros(len(part), 4), torch.zeros(len(part)))
    detector.finish_fit()
    assert torch.equal(detector.fitted["threshold"], fitted(features).fitted["threshold"])


def test_adds_up_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the other process had had the same images."""
    monkeypatch.setattr(react, "sum_over_processes", lambda counts: counts * 2)
    both = fitted(draw())
    monkeypatch.undo()
    assert torch.equal(both.fitted["threshold"], fitted(torch.cat([draw(), draw()])).fitted["threshold"])


def test_saved_and_loaded() -> None:
    detector, fresh = fitted(draw()), ReAct()
    fresh.load_state_dict(detector.state_dict())
    features = draw("signed")
    assert torch.equal(fresh.score(features, features), detector.score(features, features))
    assert all(isinstance(value, Tensor) for value in detector.fitted.values())


def test_keeps_the_head_as_it_was() -> None:
    head = make_head()
    detector, expected = fitted(draw(), head=head), make_head().weight
    head.weight.zero_()
    assert torch.equal(detector.fitted["weight"], expected)


def test_finds_single_large_activations_that_hide_from_the_energy() -> None:
    head = Head(torch.rand(4, 64, generator=generator(3)), torch.zeros(4))
    known = torch.rand(400, 64, generator=generator(4))
    unknown = torch.rand(400, 64, generator=generator(5)) * 0.5
    unknown[:, 0] = 60.0
    detector = fitted(known[:200], head=head)
    features = torch.cat([known[200:], unknown])
    logits, positives = features @ head.weight.T, torch.arange(600) >= 200
    assert float(rank_auroc(Energy().score(features, logits), positives)) < 0.2
    assert float(rank_auroc(detector.score(features, logits), positives)) > 0.95


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_bad_percentile(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"Expected argument `percentile` to be a float in \(0, 100\]"):
        ReAct(percentile)


def test_without_head_or_data() -> None:
    with pytest.raises(ValueError, match="`ReAct` needs the model's last linear layer"):
        ReAct().begin_fit()
    detector = ReAct()
    detector.begin_fit(make_head())
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        detector.finish_fit()
    with pytest.raises(RuntimeError, match="`ReAct` has to be fitted"):
        ReAct().score(draw(), draw())
