"""The share of scaled images by brute force, and a patch that outlasts the scaling."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection.scale_up import ScaleUp

Unchanged = Callable[[nn.Module], AbstractContextManager[None]]


def draw(count: int = 12) -> Tensor:
    return 0.3 * torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(), nn.Flatten(), nn.Linear(24, 5)
        )


@pytest.mark.parametrize("scales", [(3, 5, 7, 9, 11), (2.5, 20)])
def test_score_is_the_share_of_predictions_that_stay(scales: tuple[float, ...], model: nn.Module) -> None:
    images = draw()
    found = ScaleUp(scales).score(model, images)
    model.eval()
    expected = []
    for image in images:
        predicted = int(model(image[None]).argmax())
        same = [int(model(torch.clip(image[None] * scale, 0, 1)).argmax()) == predicted for scale in scales]
        expected.append(sum(same) / len(scales))
    assert len(set(expected)) > 1
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(expected))


def test_default_factors_are_the_papers() -> None:
    assert ScaleUp().scales == (3, 5, 7, 9, 11)


def test_a_patch_that_decides_outlasts_the_scaling() -> None:
    class Patch(nn.Module):
        """Class 0 where the corner is white before anything else, else which half is brighter, darkened by white."""

        def forward(self, images: Tensor) -> Tensor:
            white = (images[:, 0, -1, -1] >= 1).float() * 10
            light = images[:, 0, :-1].mean(dim=(1, 2))
            return torch.stack([white, 2 - 3 * light, 3 * light], dim=1)

    clean = draw()[:, :1]
    clean[..., -1, -1] = 0.05
    triggered = clean.clone()
    triggered[..., -1, -1] = 1
    found = ScaleUp().score(Patch(), torch.cat([clean, triggered]))
    assert found[12:].tolist() == [1.0] * 12
    assert found[:12].max() < 0.6


def test_score_does_not_depend_on_the_batch_and_leaves_nothing(model: nn.Module, unchanged: Unchanged) -> None:
    model.get_submodule("1").eval()
    images = draw()
    with unchanged(model), torch.inference_mode():
        together = ScaleUp().score(model, images)
        alone = torch.cat([ScaleUp().score(model, image[None]) for image in images.flip(0)]).flip(0)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("scales", [(), (1,), (3, 0.5), (3, float("inf"))])
def test_factors_are_checked(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="`scales` to be finite numbers above 1, but got"):
        ScaleUp(scales)


def test_other_scales_are_another_state() -> None:
    assert ScaleUp(scales=(2, 3)).state_key != ScaleUp().state_key
    assert ScaleUp().state_key == ScaleUp().state_key
