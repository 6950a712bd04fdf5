"""Trigger inversion against one class at a time, written with plain numbers, and statistics against NumPy."""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd import backbones
from lightning_bd.functional.trigger_inversion import TriggerInversion, anomaly_indices, stamp

SHAPE = (2, 4, 4)
CLASSES = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def batches() -> Iterator[Tensor]:
    number = 0
    while True:
        yield draw((5, 7)[number % 2], *SHAPE, seed=number)
        number += 1


class OneClass:
    """The method for one class, its bookkeeping in Python numbers."""

    def __init__(self, model: nn.Module, target: int, mask: Tensor, pattern: Tensor, stop_after: int) -> None:
        self.model, self.target, self.stop_after = model, target, stop_after
        self.raw = [torch.atanh(2 * tensor - 1) for tensor in (mask, pattern)]
        self.first = [torch.zeros_like(raw) for raw in self.raw]
        self.second = [torch.zeros_like(raw) for raw in self.raw]
        self.time = 0
        self.cost = 0.0
        self.ups = self.downs = self.unchanged = 0
        self.went_up = self.went_down = self.stopped = False
        self.best: tuple[float, Tensor, Tensor] = (math.inf, mask, pattern)
        self.hits = self.total = 0

    def update(self, images: Tensor) -> None:
        if self.stopped:
            return
        raw = [tensor.clone().requires_grad_() for tensor in self.raw]
        mask, pattern = (torch.sigmoid(2 * tensor) for tensor in raw)
        logits = self.model(images * (1 - mask) + pattern * mask)
        labels = torch.full((len(images),), self.target)
        loss = F.cross_entropy(logits, labels) + self.cost * mask.abs().sum()
        self.hits += int((logits.argmax(1) == self.target).sum())
        self.total += len(images)
        self.time += 1
        for i, gradient in enumerate(torch.autograd.grad(loss, raw)):
            self.first[i] = 0.5 * self.first[i] + 0.5 * gradient
            self.second[i] = 0.9 * self.second[i] + 0.1 * gradient**2
            mean = self.first[i] / (1 - 0.5**self.time)
            spread = (self.second[i] / (1 - 0.9**self.time)).sqrt()
            self.raw[i] = self.raw[i] - 0.1 * mean / (spread + 1e-8)

    def adapt(self, patience: int, multiplier: float, threshold: float, first_cost: float) -> None:
        if self.stopped:
            return
        mask, pattern = (torch.sigmoid(2 * tensor) for tensor in self.raw)
        works = self.hits / self.total >= threshold
        self.hits = self.total = 0
        norm = float(mask.sum())
        if works and norm < self.best[0]:
            self.best = (norm, mask, pattern)
            self.unchanged = 0
        elif self.best[0] < math.inf:
            self.unchanged += 1
        else:
            self.best = (math.inf, mask, pattern)
        self.ups, self.downs = (self.ups + 1, 0) if works else (0, self.downs + 1)
        if self.ups == patience:
            self.ups = 0
            self.went_up |= self.cost > 0
            self.cost = self.cost * multiplier if self.cost else first_cost
        if self.downs == patience:
            self.downs = 0
            self.went_down |= self.cost > 0
            self.cost /= multiplier**1.5
        self.stopped = self.went_up and self.went_down and self.unchanged >= self.stop_after


@pytest.mark.parametrize("images_per_pass", [1, 15, 4096])
def test_all_classes_at_once_equal_one_at_a_time(images_per_pass: int) -> None:
    model = make_model()
    # Only two of the four classes, in another order.
    targets = [3, 1]
    masks, patterns = draw(2, 1, 4, 4, seed=100), draw(2, *SHAPE, seed=101)
    inversion = TriggerInversion(
        masks,
        patterns,
        torch.tensor(targets),
        cost=0.01,
        cost_multiplier=3.0,
        patience=3,
        success_threshold=0.9,
        early_stop=6,
        images_per_pass=images_per_pass,
    )
    singles = [OneClass(model, t, masks[i], patterns[i], stop_after=6) for i, t in enumerate(targets)]
    stream = batches()
    finished = False
    stops = []
    for _ in range(200):
        for images in islice(stream, 3):
            inversion.update(model, images)
            for single in singles:
                single.update(images)
        assert not finished
        finished = inversion.adapt()
        for single in singles:
            single.adapt(patience=3, multiplier=3.0, threshold=0.9, first_cost=0.01)
        assert inversion.active.tolist() == [not single.stopped for single in singles]
        for i, single in enumerate(singles):
            if not single.stopped:
                assert inversion.costs[i].item() == pytest.approx(single.cost)
            torch.testing.assert_close(inversion.masks[i], single.best[1], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(inversion.patterns[i], single.best[2], rtol=1e-3, atol=1e-4)
        stops.append(int(inversion.active.sum()))
        if finished:
            break
    assert finished
    assert 1 in stops, "the classes stop at different steps"
    assert len(stops) > 20
    assert inversion.reached.all()


class Constant(nn.Module):
    """Sends everything to class 0, or from a given call on to class 1."""

    def __init__(self, switch: int | None = None) -> None:
        super().__init__()
        self.calls, self.switch = 0, switch

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        first = 1.0 if self.switch is None or self.calls <= self.switch else -1.0
        return torch.tensor([first, -first]).expand(len(images), 2) + 0 * images.sum(dim=(1, 2, 3))[:, None]


def test_the_weight_of_the_norm_follows_success() -> None:
    half = torch.full((1, 1, 2, 2), 0.5)
    model = Constant(switch=6)
    inversion = TriggerInversion(half, half, torch.tensor([0]), cost=0.5, cost_multiplier=4.0, patience=2)
    costs = []
    for _ in range(10):
        inversion.update(model, torch.zeros(3, 1, 2, 2))
        inversion.adapt()
        costs.append(inversion.costs.item())
    # Nothing, begun, multiplied twice by 4; then divided by 4^1.5 = 8 after every second failure.
    assert costs == [0, 0.5, 0.5, 2.0, 2.0, 8.0, 8.0, 1.0, 1.0, 0.125]


def test_a_class_goes_on_until_its_weight_went_both_ways() -> None:
    """Begun and then only divided: to begin is not to go up."""
    half = torch.full((1, 1, 2, 2), 0.5)
    model = Constant(switch=2)
    inversion = TriggerInversion(half, half, torch.tensor([0]), patience=2, early_stop=1)
    for _ in range(12):
        inversion.update(model, torch.zeros(3, 1, 2, 2))
        assert not inversion.adapt()
    assert 0 < inversion.costs.item() < 1e-3


def test_the_weight_of_the_norm_stays_finite() -> None:
    half = torch.full((1, 1, 2, 2), 0.5)
    inversion = TriggerInversion(half, half, torch.tensor([0]), cost=1.0, cost_multiplier=1e3, patience=1)
    for _ in range(60):
        inversion.update(Constant(), torch.zeros(3, 1, 2, 2))
        assert not inversion.adapt()
    assert inversion.costs.item() == 1e6
    assert inversion.masks.isfinite().all()
    assert inversion.masks.sum() < 0.1


def test_the_last_trigger_stands_for_a_class_that_was_never_reached() -> None:
    half = torch.full((1, 1, 2, 2), 0.5)
    inversion = TriggerInversion(half, half, torch.tensor([1]))
    for _ in range(3):
        inversion.update(lambda images: torch.stack([images.mean(dim=(1, 2, 3)) + 9, images[:, 0, 0, 0]], 1), half)
        inversion.adapt()
    assert not inversion.reached.any()
    assert inversion.success.item() == 0.0
    assert inversion.costs.item() == 0.0
    assert not torch.equal(inversion.masks, half)


def test_only_mask_and_pattern_are_differentiated() -> None:
    model = backbones.small_cnn(3, in_channels=1, width=4).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks, patterns = draw(3, 1, 8, 8), draw(3, 1, 8, 8, seed=1)
    copies = masks.clone(), patterns.clone()
    inversion = TriggerInversion(masks, patterns, torch.arange(3))
    with torch.no_grad():
        inversion.update(model, draw(4, 1, 8, 8, seed=2))
    inversion.adapt()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(masks, copies[0])
    assert torch.equal(patterns, copies[1])
    assert not inversion.masks.requires_grad


def test_starting_values_of_0_and_1_can_move() -> None:
    masks = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    inversion = TriggerInversion(masks, masks, torch.tensor([1]))
    inversion.update(lambda images: torch.stack([images.sum(dim=(1, 2, 3)), images[:, 0, 0, 0]], 1), masks)
    inversion.adapt()
    assert inversion.masks.isfinite().all()
    assert not torch.equal(inversion.masks, masks)


def test_a_step_without_images_is_an_error() -> None:
    half = torch.full((1, 1, 2, 2), 0.5)
    with pytest.raises(RuntimeError, match="call `update` before it"):
        TriggerInversion(half, half, torch.tensor([0])).adapt()


def test_stamp() -> None:
    images, mask, pattern = draw(3, 2, 4, 4), draw(1, 4, 4, seed=1), draw(2, 4, 4, seed=2)
    found = stamp(images, mask, pattern)
    for b in range(3):
        for c in range(2):
            expected = images[b, c] + mask[0] * (pattern[c] - images[b, c])
            torch.testing.assert_close(found[b, c], expected)
    assert torch.equal(stamp(images, torch.zeros(1, 4, 4), pattern), images)


@pytest.mark.parametrize("count", [3, 10, 43])
def test_anomaly_indices_equal_numpy(count: int) -> None:
    norms = draw(count, seed=count) * 20
    values = norms.numpy().astype(np.float64)
    deviations = np.abs(values - np.median(values))
    expected = deviations / (1.4826 * np.median(deviations))
    np.testing.assert_allclose(anomaly_indices(norms).numpy(), expected, rtol=1e-4)


def test_equal_norms_are_no_anomaly() -> None:
    assert torch.equal(anomaly_indices(torch.full((5,), 7.0)), torch.zeros(5))
    assert torch.equal(anomaly_indices(torch.zeros(5)), torch.zeros(5))
    nearly = torch.tensor([7.0, 7.0, 7.0, 7.0, 7.0 - 5e-7])
    assert anomaly_indices(nearly).max() < 2
    outlier = anomaly_indices(torch.tensor([7.0, 7.0, 7.0, 7.0, 1.0]))
    assert outlier.isfinite().all()
    assert outlier[:4].tolist() == [0.0] * 4
    assert outlier[4] > 2
