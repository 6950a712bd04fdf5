"""ODIN against a linear model's closed form, float64 and pytorch-ood; nothing is left on the model."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.backbones import resnet18
from lightning_bd.callbacks.detection.odin import ODIN


def make(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Linear(144, 5)
    with torch.no_grad():
        head.weight.mul_(scale)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), head)
    model(torch.rand(32, 3, 8, 8))
    return model


def draw(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(model: nn.Module, images: Tensor, temperature: float, noise: float) -> Tensor:
    model = copy.deepcopy(model).double().eval()
    scores = []
    for image in images.double():
        x = image[None].clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(x) / temperature, model(x).argmax(dim=1))
        loss.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        logits = model(x.detach() - noise * x.grad.sign())
        scores.append(-float((logits / temperature).softmax(dim=1).max().detach()))
    return torch.tensor(scores)


@pytest.mark.parametrize(("temperature", "noise"), [(1000.0, 0.0014), (1.0, 0.0014), (10.0, 0.1), (1000.0, 0.0)])
def test_equals_the_formula(temperature: float, noise: float) -> None:
    model = make()
    scores = ODIN(temperature, noise).score(model, draw())
    torch.testing.assert_close(scores, by_hand(model, draw(), temperature, noise), rtol=1e-6, atol=2e-7)


def test_closed_form_of_a_linear_model() -> None:
    """Two classes: the difference d of the logits grows by noise * |w1 - w2|."""
    head = nn.Linear(192, 2, bias=False)
    model, weight = nn.Sequential(nn.Flatten(), head), head.weight.detach()
    difference = draw().flatten(1) @ (weight[0] - weight[1])
    raised = difference.abs() + 0.01 * (weight[0] - weight[1]).abs().sum()
    torch.testing.assert_close(ODIN(2.0, 0.01).score(model, draw()), -torch.sigmoid(raised / 2.0))


def test_equals_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    model = make()
    ours = ODIN(100.0, 0.01).score(model, draw())
    torch.testing.assert_close(ours, detectors.ODIN(model.eval(), eps=0.01, temperature=100.0).predict(draw()))


def test_large_logits() -> None:
    model = make(scale=1e5)
    assert float(model.eval()(draw()).detach().abs().max()) > 1e4
    scores = ODIN().score(model, draw())
    torch.testing.assert_close(scores, by_hand(model, draw(), 1000.0, 0.0014), rtol=1e-3, atol=1e-6)


class Half(nn.Module):
    """In half precision, where 1e-8 is zero; notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.seen = nn.Linear(192, 3).half(), list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach())
        logits: Tensor = self.head(images.half().flatten(1))
        return logits


def test_small_gradients_are_not_lost() -> None:
    model = Half()
    ODIN(temperature=1e8, noise=0.1).score(model, draw())
    before, after = model.seen
    torch.testing.assert_close((after - before).abs(), torch.full_like(before, 0.1))


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = make()
    scores = ODIN().score(model, draw())
    alone = torch.cat([ODIN().score(model, image[None]) for image in draw()])
    torch.testing.assert_close(alone, scores, rtol=0, atol=2e-7)
    assert torch.equal(ODIN().score(model, draw()), scores)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_leaves_no_trace(context: type[torch.no_grad]) -> None:
    model = make()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    modes, needs = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    images, state = draw(), torch.get_rng_state()
    with context():
        scores = ODIN().score(model, images)
    assert not scores.requires_grad
    assert not scores.is_inference()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())
    assert torch.equal(images, draw())
    assert not images.requires_grad


def test_runs_on_a_residual_network() -> None:
    scores = ODIN().score(resnet18(num_classes=4, width=4), torch.rand(2, 3, 32, 32))
    assert scores.shape == (2,)
    assert ((scores >= -1) & (scores <= -0.25)).all()


def test_bad_values() -> None:
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="Expected argument `temperature` to be a positive float"):
            ODIN(temperature)
    for noise in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="Expected argument `noise` to be a non-negative float"):
            ODIN(noise=noise)


class Detached(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)


def test_a_model_without_gradient() -> None:
    with pytest.raises(ValueError, match="`ODIN` needs the gradient to the images"):
        ODIN().score(Detached(), draw())
