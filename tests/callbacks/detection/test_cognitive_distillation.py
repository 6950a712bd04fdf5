"""Scores are the masks' norms, on logits or features; small where a trigger decides; nothing is left on the model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bd import backbones
from lightning_bd.callbacks.detection.cognitive_distillation import CognitiveDistillation
from lightning_bd.functional.cognitive_distillation import distill

Unchanged = Callable[[nn.Module], AbstractContextManager[None]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = backbones.small_cnn(4, in_channels=2, width=4)
        nn.init.normal_(model.get_parameter("fc.weight"))
        for _ in range(5):
            model(torch.rand(16, 2, 8, 8))  # running statistics of its own
    return model


class Gate(nn.Module):
    """Class 0 where the corner is white; else all pixels decide."""

    target: Tensor

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        self.weights = nn.Parameter(weights)
        self.register_buffer("target", torch.tensor([4.0, 0.0, 0.0, 0.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        gate = torch.sigmoid(40 * (images[:, 0, -2:, -2:].mean(dim=(1, 2)) - 0.8))[:, None]
        logits: Tensor = gate * self.target + (1 - gate) * (images.flatten(1) @ self.weights)
        return logits


@pytest.mark.parametrize("target", ["logits", "features"])
def test_masks_of_triggered_images_are_smaller(target: Literal["logits", "features"]) -> None:
    clean = 0.5 * draw(20, 1, 8, 8)
    triggered = clean.clone()
    triggered[..., -2:, -2:] = 1
    model = Gate()
    # Features here are the logits.
    layered = nn.Sequential(model, nn.Linear(5, 5))
    detector = CognitiveDistillation(target, alpha=0.01, layer="0" if target == "features" else None)
    found = detector.score(layered if target == "features" else model, torch.cat([clean, triggered]))
    assert found[20:].min() > found[:20].max() + 5
    masks = detector.masks(layered if target == "features" else model, triggered)
    assert masks[..., -2:, -2:].mean(dim=(1, 2, 3)).min() > 0.4
    assert masks[..., :4, :4].max() < 0.1
    # Three standard deviations below the clean masks there is none of them.
    assert (found > detector.threshold(found[:20], gamma=3.0)).tolist() == [False] * 20 + [True] * 20


@pytest.mark.parametrize(("target", "alpha"), [("logits", 0.01), ("features", 0.001)])
def test_score_is_the_negative_norm_of_the_masks(
    target: Literal["logits", "features"], alpha: float, model: nn.Module
) -> None:
    images = draw(3, 2, 8, 8)
    detector = CognitiveDistillation(target, beta=2.0, steps=10, lr=0.2, mask_channels=2, seed=4)
    found, masks = detector.score(model, images), detector.masks(model, images)
    assert masks.shape == (3, 2, 8, 8)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert torch.equal(found, -masks.sum(dim=(1, 2, 3)))
    assert torch.equal(detector.explain(model, images), masks)
    model.eval()
    features = model.get_submodule("features")
    outputs: Callable[[Tensor], Tensor] = model if target == "logits" else lambda x: features(x).amax(dim=(2, 3))
    expected = distill(outputs, images, alpha=alpha, beta=2.0, steps=10, lr=0.2, mask_channels=2, seed=4)
    assert torch.allclose(masks, expected, rtol=0, atol=1e-6)


def test_features_of_a_named_layer_are_averaged_over_space(model: nn.Module) -> None:
    images = draw(2, 2, 8, 8)
    found = CognitiveDistillation("features", alpha=0.02, steps=10, layer="features.0").masks(model, images)
    convolution = model.eval().get_submodule("features.0")
    expected = distill(lambda x: convolution(x).mean(dim=(2, 3)), images, alpha=0.02, steps=10)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_features_are_the_input_of_the_last_linear_layer() -> None:
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh())
    images = draw(2, 1, 4, 4)
    model = nn.Sequential(hidden, nn.Linear(6, 3))
    found = CognitiveDistillation("features", steps=5).masks(model, images)
    assert torch.allclose(found, distill(hidden, images, alpha=0.001, steps=5), rtol=0, atol=1e-6)


def test_normalisation_may_be_the_models_first_layer(model: nn.Module) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net((images - 0.4) / 0.2)
            return logits

    images = draw(2, 2, 8, 8)
    found = CognitiveDistillation(steps=10).masks(Normalized(), images)
    model.eval()
    expected = distill(lambda x: model((x - 0.4) / 0.2), images, alpha=0.01, steps=10)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["logits", "features"])
def test_score_does_not_depend_on_the_batch(target: Literal["logits", "features"], model: nn.Module) -> None:
    images = draw(5, 2, 8, 8)
    detector = CognitiveDistillation(target, alpha=0.01, steps=50)
    together = detector.masks(model, images)
    alone = torch.cat([detector.masks(model, image[None]) for image in images.flip(0)]).flip(0)
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)
    assert torch.allclose(detector.score(model, images), -alone.sum(dim=(1, 2, 3)), rtol=1e-5)


class FailsAt(nn.Module):
    """Passes images on until a number of calls is reached."""

    def __init__(self, model: nn.Module, call: int) -> None:
        super().__init__()
        self.model, self.left = model, call

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("no more")
        logits: Tensor = self.model(images)
        return logits


@pytest.mark.parametrize("target", ["logits", "features"])
@pytest.mark.parametrize("inference", [False, True])
def test_nothing_is_left_on_the_model(
    target: Literal["logits", "features"], inference: bool, model: nn.Module, unchanged: Unchanged
) -> None:
    model.get_submodule("features.1").eval().requires_grad_(False)
    with torch.inference_mode(inference):
        images = draw(3, 2, 8, 8)
        detector = CognitiveDistillation(target, steps=3)
        with unchanged(model):
            scores, masks = detector.score(model, images), detector.masks(model, images)
        assert not scores.requires_grad
        assert not masks.requires_grad
        for call in (1, 3):
            failing = FailsAt(model, call)
            with unchanged(failing), pytest.raises(RuntimeError, match="no more"):
                detector.score(failing, images)


def test_a_model_without_features_is_told_how_to_name_some() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())
    with pytest.raises(MisconfigurationException, match="Name the layer that gives them"):
        CognitiveDistillation("features", steps=1).score(model, draw(2, 1, 4, 4))
    with pytest.raises(MisconfigurationException, match=r"has no layer `1\.conv`"):
        CognitiveDistillation("features", steps=1, layer="1.conv").score(model, draw(2, 1, 4, 4))


def test_threshold_is_gamma_deviations_below_the_mean_norm() -> None:
    norms = torch.tensor([100.0, 120.0, 80.0, 104.0])
    mean = float(norms.mean())
    deviation = float(((norms - mean) ** 2).mean().sqrt())
    detector = CognitiveDistillation()
    assert detector.threshold(-norms) == pytest.approx(-(mean - deviation))
    assert detector.threshold(-norms, gamma=2.5) == pytest.approx(-(mean - 2.5 * deviation))
    with pytest.raises(ValueError, match="at least one clean image, but got none"):
        detector.threshold(torch.empty(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "probabilities"}, "`target` to be one of .*, but got 'probabilities'"),
        ({"layer": "fc"}, "`layer` to be None unless `target` is 'features', but got 'fc'"),
        ({"alpha": -0.1}, "`alpha` to be a non-negative float, but got -0.1"),
        ({"alpha": float("nan")}, "`alpha` to be a non-negative float, but got nan"),
        ({"beta": -1.0}, "`beta` to be a non-negative float, but got -1.0"),
        ({"lr": 0.0}, "`lr` to be a positive float, but got 0.0"),
        ({"steps": 0}, "`steps` to be a positive integer, but got 0"),
        ({"mask_channels": 0}, "`mask_channels` to be a positive integer, but got 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CognitiveDistillation(**arguments)
