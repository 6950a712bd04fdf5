"""The two copies against a plain loop over a deep copy, the score against its formula, and a backdoor on digits."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.callbacks.detection.badexpert import BaDExpert
from lightning_bd.callbacks.detection.base import InputDetector
from lightning_bd.functional.draws import keyed_generator

Unchanged = Callable[[nn.Module], AbstractContextManager[None]]


class Attacked(Protocol):
    """What the fixture of a backdoored model gives."""

    trained: nn.Module
    clean: Tensor

    def auroc(self, detector: InputDetector, count: int = 100) -> float: ...


def draw(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 23, size: int = 5, classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(draw(count), size), torch.split(torch.arange(count) % classes, size), strict=True))


def make(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Dropout(dropout), nn.Flatten(), nn.Linear(24, 5)
        )
        model(torch.rand(32, 2, 4, 4))
    return model


def copy_of(detector: BaDExpert, name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name + "."): t for key, t in detector.fitted.items() if key.startswith(name)}


def by_hand(detector: BaDExpert, name: str, images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """Train a deep copy with torch's optimizers."""
    twin = make().train()
    if name == "expert":
        epochs, size = detector.expert_epochs, detector.expert_batch_size
        optimizer: torch.optim.Optimizer = torch.optim.Adam(twin.parameters(), lr=detector.expert_lr)
        rates = [detector.expert_lr] * epochs
        labels = torch.tensor([(int(label) + 1) % 5 for label in labels])
    else:
        epochs, size = detector.auxiliary_epochs, detector.auxiliary_batch_size
        optimizer = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
        rates = [detector.auxiliary_lr * 0.1 ** (epoch // (epochs // 5)) for epoch in range(epochs)]
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=keyed_generator(detector.seed, "badexpert", name, epoch))
        for rows in torch.split(order, size):
            for group in optimizer.param_groups:
                group["lr"] = rates[epoch]
            optimizer.zero_grad()
            F.cross_entropy(twin(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return twin.state_dict()


def formula(model: nn.Module, expert: nn.Module, auxiliary: nn.Module, image: Tensor) -> float:
    with torch.no_grad():
        p = int(model(image[None]).argmax())
        b = float(torch.softmax(expert(image[None]), 1)[0, p])
        a = float(torch.softmax(auxiliary(image[None]), 1)[0, p])
    return -min(2 * a / max(b, 1e-8), (1 - b) / max(0.5 - a, 1e-8))


@pytest.fixture
def detector() -> BaDExpert:
    # 21 of 23 images to train on: batches of 8, 8 and 5, and of 6, 6, 6 and 3.
    return BaDExpert(expert_lr=0.05, expert_epochs=2, expert_batch_size=8, auxiliary_batch_size=6, seed=3)


def test_copies_and_scores_are_those_of_a_plain_loop(detector: BaDExpert) -> None:
    model = make()
    detector.fit(model, batches())
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    order = torch.randperm(23, generator=keyed_generator(3, "badexpert"))
    held_out, rest = order[:2], order[2:]
    copies = {}
    for name in ("expert", "auxiliary"):
        expected = by_hand(detector, name, images[rest], labels[rest])
        found = copy_of(detector, name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-5), f"{name} {key}"
            assert not found[key].requires_grad
        copies[name] = make().eval()
        copies[name].load_state_dict(found)
    model.eval()
    tested = draw(10, seed=5)
    expected_scores = [formula(model, copies["expert"], copies["auxiliary"], image) for image in tested]
    assert detector.score(model, tested).tolist() == pytest.approx(expected_scores, rel=1e-4)
    clean = sorted(formula(model, copies["expert"], copies["auxiliary"], image) for image in images[held_out])
    assert detector.threshold == pytest.approx(clean[0] + 0.99 * (clean[1] - clean[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("b", "a", "expected"),
    [
        (0.9, 0.1, -min(0.2 / 0.9, 0.1 / 0.4)),
        (0.9, 0.7, -2 * 0.7 / 0.9),
        (0.6, 0.05, -0.1 / 0.6),
        (0.3, 0.45, -min(3.0, 0.7 / 0.05)),
        (0.0, 0.5, -1e8),
        (1.0, 0.6, 0.0),
    ],
)
def test_score_follows_the_formula(b: float, a: float, expected: float) -> None:
    class Constant(nn.Module):
        def __init__(self, probability: float) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([probability, 1 - probability]).log())

        def forward(self, images: Tensor) -> Tensor:
            return self.logits.expand(len(images), 2)

    detector = BaDExpert()
    detector.fitted = {
        "expert.logits": Constant(b).logits.detach(),
        "auxiliary.logits": Constant(a).logits.detach(),
        "threshold": torch.tensor(0.0),
    }
    assert detector.score(Constant(0.8), draw(1)).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_fit_is_repeatable_and_leaves_nothing(detector: BaDExpert, unchanged: Unchanged) -> None:
    model = make(dropout=0.5)
    model[1].eval()
    with unchanged(model), torch.inference_mode():
        detector.fit(model, batches())
        scores = detector.score(model, draw(4))
    model.requires_grad_(False)
    torch.manual_seed(7)
    again = copy.copy(detector)
    with unchanged(model):
        again.fit(model, batches(size=11))
    assert all(torch.equal(tensor, again.fitted[key]) for key, tensor in detector.fitted.items())
    assert torch.equal(again.score(model, draw(4)), scores)
    assert not torch.equal(detector.fitted["expert.0.weight"], model.get_parameter("0.weight"))


def test_the_model_is_put_back_after_a_failure(detector: BaDExpert, unchanged: Unchanged) -> None:
    model = make(dropout=0.5)
    calls = []

    def fail(module: nn.Module, inputs: object) -> None:
        calls.append(module.training)
        if len(calls) == 4:
            raise RuntimeError("no more")

    model[4].register_forward_pre_hook(fail)
    hooks = copy.copy(model[4]._forward_pre_hooks)
    model[4]._forward_pre_hooks.clear()
    with unchanged(model):
        model[4]._forward_pre_hooks.update(hooks)
        with pytest.raises(RuntimeError, match="no more"):
            detector.fit(model, batches())
        model[4]._forward_pre_hooks.clear()
    assert calls == [False, True, True, True]
    assert not detector.fitted


def test_state_travels(detector: BaDExpert) -> None:
    model = make()
    detector.fit(model, batches())
    other = BaDExpert(expert_lr=0.05, expert_epochs=2, expert_batch_size=8, auxiliary_batch_size=6, seed=3)
    with pytest.raises(RuntimeError, match="has to be fitted"):
        _ = other.threshold
    other.load_state_dict(detector.state_dict())
    assert torch.equal(other.score(model, draw(4)), detector.score(model, draw(4)))
    assert other.threshold == detector.threshold


def test_score_does_not_depend_on_the_batch(detector: BaDExpert) -> None:
    model = make()
    detector.fit(model, batches())
    images = draw(6, seed=1)
    alone = torch.cat([detector.score(model, image[None]) for image in images.flip(0)]).flip(0)
    assert torch.allclose(detector.score(model, images), alone, rtol=1e-5)


class Module(LightningModule):
    """A user's module, tested by a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def test_a_module_with_a_trainer_is_not_copied(detector: BaDExpert) -> None:
    module = Module()
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    detector.fit(module, batches())
    plain = BaDExpert(expert_lr=0.05, expert_epochs=2, expert_batch_size=8, auxiliary_batch_size=6, seed=3)
    plain.fit(module.net, batches())
    assert torch.equal(detector.score(module, draw(4)), plain.score(module.net, draw(4)))
    assert "expert.net.0.weight" in detector.fitted


def test_a_single_image_at_the_end_is_left_out() -> None:
    sizes = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            sizes.append(len(inputs[0]))

    model = make()
    model.register_forward_pre_hook(note)
    # 9 of 10 images to train on.
    BaDExpert(expert_batch_size=4, auxiliary_batch_size=8, auxiliary_epochs=1).fit(model, batches(10))
    assert sizes == [4, 4, 8]


def test_clean_data_are_checked() -> None:
    with pytest.raises(ValueError, match="at least two clean images"):
        BaDExpert().fit(make(), batches(1))
    with pytest.raises(ValueError, match="at least two clean images"):
        BaDExpert().fit(make(), [])
    with pytest.raises(ValueError, match=r"labels in \[0, 5\), the classes of the model, but got 0 to 6"):
        BaDExpert().fit(make(), batches(classes=7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_lr": 0.0}, "`expert_lr` to be a positive float, but got 0.0"),
        ({"auxiliary_lr": float("inf")}, "`auxiliary_lr` to be a positive float, but got inf"),
        ({"expert_epochs": 0}, "`expert_epochs` to be a positive integer, but got 0"),
        ({"expert_batch_size": 0}, "`expert_batch_size` to be a positive integer, but got 0"),
        ({"auxiliary_epochs": 0}, "`auxiliary_epochs` to be a positive integer, but got 0"),
        ({"auxiliary_batch_size": 0}, "`auxiliary_batch_size` to be a positive integer, but got 0"),
        ({"holdout": 1.0}, r"`holdout` to be a share in \(0, 1\), but got 1.0"),
        ({"false_positive_rate": 0.0}, r"`false_positive_rate` to be a share in \(0, 1\), but got 0.0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaDExpert(**arguments)


def test_badnets_is_found_on_digits(attacked_digits: Attacked) -> None:
    detector = BaDExpert()
    assert attacked_digits.auroc(detector) > 0.9
    assert (detector.score(attacked_digits.trained, attacked_digits.clean) > detector.threshold).float().mean() < 0.1
