"""Entropies of blends one by one in NumPy, the sample of overlays, and a backdoor on digits."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection import strip
from lightning_bd.callbacks.detection.base import InputDetector
from lightning_bd.callbacks.detection.strip import STRIP

Unchanged = Callable[[nn.Module], AbstractContextManager[None]]


class Attacked(Protocol):
    """What the fixture of a backdoored model gives."""

    trained: nn.Module
    clean: Tensor

    def auroc(self, detector: InputDetector, count: int = 100) -> float: ...


def draw(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def batches(images: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part)).long()) for part in torch.split(images, size)]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(24, 5))
        model(torch.rand(32, 2, 4, 4))
    return model


@pytest.mark.parametrize("blend", ["add", "average"])
def test_score_is_the_negative_mean_entropy_of_the_blends(blend: Literal["add", "average"], model: nn.Module) -> None:
    detector = STRIP(num_overlays=4, blend=blend)
    detector.fit(model, batches(draw(9), 5))
    images = draw(3, seed=1)
    found = detector.score(model, images)
    double = model.eval().double()
    for image, score in zip(images.double(), found, strict=True):
        entropies = []
        for overlay in detector.fitted["overlays"].double():
            mixed = np.clip((image + overlay).numpy(), 0, 1) if blend == "add" else (0.5 * (image + overlay)).numpy()
            logits = double(torch.from_numpy(mixed)[None])[0].detach().numpy()
            p = np.exp(logits) / np.exp(logits).sum()
            entropies.append(-(p * np.log2(p)).sum())
        assert float(score) == pytest.approx(-np.mean(entropies), rel=1e-5)
    model.float()


def test_bounds_of_the_score() -> None:
    for bias, expected in ((1e4, 0.0), (0.0, -3.0)):
        head = nn.Linear(32, 8)
        nn.init.zeros_(head.weight)
        head.bias.data = torch.tensor([bias] + [0.0] * 7)
        net = nn.Sequential(nn.Flatten(), head)
        detector = STRIP(num_overlays=3)
        detector.fit(net, batches(draw(3), 3))
        assert detector.score(net, draw(2)).tolist() == pytest.approx([expected] * 2)


def test_overlays_are_a_random_sample_of_the_clean_images(model: nn.Module) -> None:
    images = draw(40)
    fitted = []
    for size in (40, 7, 1):
        detector = STRIP(num_overlays=10)
        detector.fit(model, batches(images, size))
        fitted.append(detector.fitted["overlays"])
    assert torch.equal(fitted[0], fitted[1])
    assert torch.equal(fitted[0], fitted[2])
    rows = [int((images == overlay).flatten(1).all(dim=1).nonzero()) for overlay in fitted[0]]
    assert len(set(rows)) == 10
    assert max(rows) >= 20
    other = STRIP(num_overlays=10, seed=1)
    other.fit(model, batches(images, 40))
    assert not torch.equal(other.fitted["overlays"], fitted[0])


def test_fewer_clean_images_than_overlays_are_all_used(model: nn.Module) -> None:
    detector = STRIP()
    detector.fit(model, batches(draw(6), 4))
    assert sorted(detector.fitted["overlays"].sum(dim=(1, 2, 3)).tolist()) == sorted(
        draw(6).sum(dim=(1, 2, 3)).tolist()
    )


def test_state_travels(model: nn.Module) -> None:
    detector, other = STRIP(num_overlays=5), STRIP(num_overlays=5)
    detector.fit(model, batches(draw(9), 4))
    other.load_state_dict(detector.state_dict())
    images = draw(3, seed=1)
    assert torch.equal(other.score(model, images), detector.score(model, images))
    with pytest.raises(RuntimeError, match="has to be fitted"):
        STRIP().score(model, images)


def test_score_does_not_depend_on_the_batch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = STRIP(num_overlays=5)
    detector.fit(model, batches(draw(9), 4))
    images = draw(6, seed=1)
    together = detector.score(model, images)
    alone = torch.cat([detector.score(model, image[None]) for image in images.flip(0)]).flip(0)
    assert torch.allclose(together, alone, atol=1e-6)
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for most, expected in ((13, [12, 12, 6]), (2, [6] * 5)):
        monkeypatch.setattr(strip, "_IMAGES_PER_PASS", most)
        sizes.clear()
        assert torch.allclose(detector.score(model, images), together, atol=1e-6)
        assert sizes == expected


def test_nothing_is_left_on_the_model(model: nn.Module, unchanged: Unchanged) -> None:
    model.get_submodule("1").eval().requires_grad_(False)
    detector = STRIP(num_overlays=5)
    with unchanged(model), torch.inference_mode():
        detector.fit(model, batches(draw(9), 4))
        detector.score(model, draw(3))
    assert not detector.fitted["overlays"].is_inference()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"shape that it was fitted on, \(2, 4, 4\), but got \(2, 5, 5\)"),
    ):
        detector.score(model, torch.zeros(1, 2, 5, 5))


def test_clean_images_are_needed(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="clean images to lay over others, but got none"):
        STRIP().fit(model, [])


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="`num_overlays` to be a positive integer, but got 0"):
        STRIP(num_overlays=0)
    blend: Any = "multiply"
    with pytest.raises(ValueError, match=r"`blend` to be one of .*, but got 'multiply'"):
        STRIP(blend=blend)


def test_badnets_is_found_on_digits(attacked_digits: Attacked) -> None:
    assert attacked_digits.auroc(STRIP()) > 0.9
