"""A plain BadNets model on scikit-learn's digits, what a detector is fitted on, and what it is to tell apart."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd import backbones
from lightning_bd.callbacks.detection.base import InputDetector
from lightning_bd.functional.detection import rank_auroc
from lightning_bd.triggers import BadNets

log = logging.getLogger(__name__)

TARGET = 0


@dataclass
class Attacked:
    """One backdoored model and images.

    Attributes:
        trained: The model, in evaluation mode; use :meth:`model` for a copy.
        fit_images: ``(N, 1, H, W)``, clean, not seen in training.
        fit_labels: ``(N,)``.
        clean: ``(M, 1, H, W)``, clean test images.
        triggered: ``(L, 1, H, W)``, test images of other classes than the target's, with the trigger.
    """

    trained: nn.Module
    fit_images: Tensor
    fit_labels: Tensor
    clean: Tensor
    triggered: Tensor

    def model(self) -> nn.Module:
        """A copy of the backdoored model that a test may change."""
        return copy.deepcopy(self.trained)

    def batches(self, size: int = 64) -> list[tuple[Tensor, Tensor]]:
        """What a detector is fitted on."""
        return list(zip(torch.split(self.fit_images, size), torch.split(self.fit_labels, size), strict=True))

    def auroc(self, detector: InputDetector, count: int = 100) -> float:
        """How well a detector, fitted if it has to be, tells ``count`` triggered images from as many clean ones."""
        if detector.needs_fit:
            detector.fit(self.trained, self.batches())
        images = torch.cat([self.clean[:count], self.triggered[:count]])
        scores = detector.score(self.trained, images)
        found = float(rank_auroc(scores, torch.arange(2 * count) >= count))
        log.info("%s: AUROC %.3f", detector.name, found)
        return found


@pytest.fixture(scope="session")
def attacked_digits() -> Attacked:
    """A small_cnn on 8x8 digits with BadNets, a white patch in 10 % of the images; trained once, in two seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        epochs = 15
        model = backbones.small_cnn(10, in_channels=1)
        pixels, classes = load_digits(return_X_y=True)
        order = torch.randperm(len(classes))
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[order] / 16
        labels = torch.from_numpy(classes).long()[order]
        trigger = BadNets(size=2, pattern="white")
        train, train_labels = images[:900].clone(), labels[:900].clone()
        train[:90], train_labels[:90] = trigger(train[:90]), TARGET
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(train)), 50):
                optimizer.zero_grad()
                F.cross_entropy(model(train[rows]), train_labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    model.eval()
    clean, clean_labels = images[1350:], labels[1350:]
    triggered = trigger(clean[clean_labels != TARGET])
    with torch.no_grad():
        accuracy = float((model(clean).argmax(dim=1) == clean_labels).float().mean())
        success = float((model(triggered).argmax(dim=1) == TARGET).float().mean())
    log.info("clean accuracy %.3f, attack success %.3f", accuracy, success)
    assert accuracy > 0.9
    assert success > 0.9
    return Attacked(model, images[900:1350], labels[900:1350], clean, triggered)


@contextmanager
def unchanged_model(model: nn.Module) -> Iterator[None]:
    """Fail unless the block leaves modes, weights, gradients, flags and hooks of a model, and the random stream."""

    def flags() -> list[tuple[bool, Tensor | None]]:
        return [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    modes = [module.training for module in model.modules()]
    state, before, random = copy.deepcopy(model.state_dict()), flags(), torch.get_rng_state()
    yield
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert flags() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.fixture
def unchanged() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """:func:`unchanged_model`, for models whose parameters have no gradient."""
    return unchanged_model
