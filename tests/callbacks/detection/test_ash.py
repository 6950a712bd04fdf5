"""ASH against loops over the activations and against pytorch-ood."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection.ash import ASH, shaped_activations
from lightning_bd.callbacks.detection.energy import energy_of_logits
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.session import ScoringSession

Variant = Literal["ash_s", "ash_p", "ash_b"]
VARIANTS: tuple[Variant, ...] = ("ash_s", "ash_p", "ash_b")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(count: int = 50, width: int = 20) -> Tensor:
    return torch.rand(count, width, generator=generator(0))


def make_head(width: int = 20) -> Head:
    return Head(torch.randn(4, width, generator=generator(1)), torch.randn(4, generator=generator(2)))


def ready(percentile: float = 90.0, variant: Variant = "ash_s", head: Head | None = None) -> ASH:
    detector = ASH(percentile, variant)
    detector.begin_fit(head or make_head())
    detector.finish_fit()
    return detector


def by_hand(row: list[float], percentile: float, variant: Variant) -> list[float]:
    kept = max(1, len(row) - round(len(row) * percentile / 100))
    largest = sorted(range(len(row)), key=lambda i: -row[i])[:kept]
    before, after = sum(row), sum(row[i] for i in largest)
    scale = math.exp(before / after) if variant == "ash_s" else 1.0
    return [(before / kept if variant == "ash_b" else v * scale) if i in largest else 0.0 for i, v in enumerate(row)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("percentile", [0.0, 33.0, 65.0, 90.0, 99.9])
def test_equals_loops(variant: Variant, percentile: float) -> None:
    features = draw().double()
    expected = torch.tensor([by_hand(row, percentile, variant) for row in features.tolist()], dtype=torch.float64)
    torch.testing.assert_close(shaped_activations(features, percentile, variant), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("percentile", [65.0, 90.0])
def test_equals_pytorch_ood(variant: Variant, percentile: float) -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    head, features = make_head(), draw()

    def logits(maps: Tensor) -> Tensor:
        return maps.flatten(1) @ head.weight.T + head.bias

    theirs = detectors.ASH(None, logits, variant.replace("_", "-"), percentile / 100)
    expected = theirs.predict_feature_maps(features[..., None, None])
    scores = ready(percentile, variant).score(features, torch.zeros(50, 4))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_removing_nothing_is_the_plain_energy() -> None:
    features, head = draw(), make_head()
    logits = nn.functional.linear(features, head.weight, head.bias)
    assert torch.equal(ready(0.0, "ash_p").score(features, logits), energy_of_logits(logits))


def test_sums_and_scales() -> None:
    features = draw()
    binary = shaped_activations(features, 75.0, "ash_b")
    torch.testing.assert_close(binary.sum(dim=1), features.sum(dim=1))
    # The ratio of the sums does not change with the scale.
    scaled, plain = (shaped_activations(f, 75.0, "ash_s") for f in (features * 8.0, features))
    torch.testing.assert_close(scaled, plain * 8.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_equal_activations_the_first_are_kept(variant: Variant) -> None:
    kept = shaped_activations(torch.ones(3, 300), 99.0, variant) > 0
    assert kept[:, :3].all()
    assert not kept[:, 3:].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_finite_in_every_case(variant: Variant) -> None:
    """No activation at all; the ratio 1000; activations whose largest ones add up to nothing or to less."""
    width = 1000
    features = torch.zeros(4, width)
    features[1] = 1.0
    features[2] = -1.0
    features[2, 0] = 0.0
    features[3] = -torch.rand(width, generator=generator(3))
    scores = ready(99.95, variant, make_head(width)).score(features, torch.zeros(4, 4))
    assert scores.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_does_not_depend_on_its_batch(variant: Variant) -> None:
    detector, features = ready(variant=variant), draw()
    alone = torch.cat([detector.score(row[None], torch.zeros(1, 4)) for row in features])
    torch.testing.assert_close(alone, detector.score(features, torch.zeros(50, 4)), rtol=1e-6, atol=1e-6)


def test_features_are_left_as_they_are() -> None:
    features = draw()
    for variant in VARIANTS:
        ready(variant=variant).score(features, torch.zeros(50, 4))
    assert torch.equal(features, draw())


def test_a_session_gives_it_the_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    images, detector = torch.rand(6, 3, 2, 2, generator=generator(4)), ASH()
    session = ScoringSession(model, [detector])
    session.open()
    session.run(0, (images, torch.zeros(6).long()))
    session.close()
    with torch.no_grad():
        expected = energy_of_logits(model[3](shaped_activations(model[:3](images))))
    torch.testing.assert_close(session.result(0)[detector].score, expected)


def test_saved_and_loaded() -> None:
    detector, fresh = ready(), ASH()
    assert not fresh.is_ready
    fresh.load_state_dict(detector.state_dict())
    assert torch.equal(fresh.score(draw(), draw()), detector.score(draw(), draw()))


def test_keeps_the_head_as_it_was() -> None:
    head = make_head()
    detector = ready(head=head)
    head.weight.zero_()
    assert torch.equal(detector.fitted["weight"], make_head().weight)


def test_bad_values() -> None:
    for percentile in (-1.0, 100.0, math.nan):
        with pytest.raises(ValueError, match=r"Expected argument `percentile` to be a float in \[0, 100\)"):
            ASH(percentile)
    with pytest.raises(ValueError, match='Expected argument `variant` to be "ash_s", "ash_p" or "ash_b"'):
        ASH(variant="ash-s")  # type: ignore[arg-type]


def test_without_head() -> None:
    with pytest.raises(ValueError, match="`ASH` needs the model's last linear layer"):
        ASH().begin_fit()
    with pytest.raises(RuntimeError, match="`ASH` has to be fitted"):
        ASH().score(draw(), draw())
