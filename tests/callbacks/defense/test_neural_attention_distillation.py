"""Neural attention distillation against a loop written by hand."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError
from lightning_bd.callbacks.defense.fine_tuning import FineTuning
from lightning_bd.callbacks.defense.neural_attention_distillation import NeuralAttentionDistillation
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule, PhaseData

CLASSES = 4
CONFIGS = Path(__file__).parents[3] / "configs" / "defense"
Pairs = Iterator[tuple[Tensor, Tensor]]


class Attacked(Protocol):
    """What the fixture of a backdoored model gives."""

    data: DefenderData

    def model(self) -> nn.Module: ...

    def check_removed(self, model: nn.Module) -> tuple[float, float]: ...


class Net(nn.Module):
    """Two stages whose maps a test can compute by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, CLASSES)

    def maps(self, images: Tensor) -> list[Tensor]:
        one = self.one(images)
        return [one, self.two(one)]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.maps(images)[-1].amax((2, 3)))
        return logits


def make_batches(sizes: tuple[int, ...], seed: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Noise with a bright quarter that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for count in sizes:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        images = 0.5 * torch.rand(count, 3, size, size, generator=generator)
        half = size // 2
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, half * (label // 2) :][:, :half, half * (label % 2) :][:, :, :half] += 0.5
        batches.append((images, labels))
    return batches


TRAIN, VALIDATION = make_batches((12, 12, 5), 0), make_batches((16, 9), 1)


def make_data(epoch_limit: int | None = None) -> DefenderData:
    def train(epoch: int) -> Pairs:
        """Each epoch has an order of its own, so that a wrong epoch number shows."""
        return iter([*TRAIN[epoch % 3 :], *TRAIN[: epoch % 3]])

    return DefenderData(train, lambda: iter(VALIDATION), CLASSES, epoch_limit)


def make_model() -> Net:
    torch.manual_seed(0)
    return Net()


def attention(features: Tensor) -> Tensor:
    """The sum of squares over channels, its squares adding up to 1."""
    squares = (features**2).sum(1)
    return squares / (squares**2).sum((1, 2), keepdim=True).sqrt()


def train_by_hand(model: Net, rate: float, epochs: int, beta: float = 0.0, teacher: Net | None = None) -> None:
    """SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for epoch in range(epochs):
        for images, labels in make_data().train(epoch):
            loss = F.cross_entropy(model(images), labels)
            if teacher is not None:
                # The running statistics are those of one pass, which happened above.
                for layer in (model.one[1], model.two[1]):
                    layer.track_running_stats = False  # type: ignore[assignment]
                for ours, theirs in zip(model.maps(images), teacher.maps(images), strict=True):
                    loss = loss + beta * ((attention(ours) - attention(theirs).detach()) ** 2).mean()
                for layer in (model.one[1], model.two[1]):
                    layer.track_running_stats = True  # type: ignore[assignment]
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    model.eval()


def equal_states(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("beta", [3.0, 500.0])
def test_equals_a_loop_by_hand(beta: float) -> None:
    teacher, student, model = make_model(), make_model(), make_model()
    train_by_hand(teacher, 0.05, epochs=4)
    train_by_hand(student, 0.05, 3, beta, teacher)
    defense = NeuralAttentionDistillation(beta, learning_rates=[0.05], max_epochs=3, teacher_epochs=4)
    report = defense.purify(model, make_data())
    for name, tensor in student.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4), name
    assert report.epochs == 3
    assert report.note == "lr 0.05, teacher lr 0.05, maps of one, two"
    assert report.values["learning_rate"] == report.values["teacher_learning_rate"] == 0.05
    assert report.values["teacher_validation_accuracy"] == pytest.approx(accuracy(teacher))
    assert report.values["validation_accuracy"] == pytest.approx(accuracy(student))
    assert report.values["validation_accuracy_before"] == pytest.approx(accuracy(make_model()))


def accuracy(model: nn.Module) -> float:
    model = copy.deepcopy(model).eval()
    return float(torch.cat([model(images).argmax(1) == labels for images, labels in VALIDATION]).float().mean())


def test_without_attention_it_is_fine_tuning_bit_for_bit() -> None:
    model, reference, copies = make_model(), make_model(), []
    model.register_forward_pre_hook(lambda module, _: copies.append(id(module)))
    settings = {"learning_rates": (0.02, 0.1), "max_drop": 0.5, "max_epochs": 3}
    report = NeuralAttentionDistillation(beta=0, **settings).purify(model, make_data())  # type: ignore[arg-type]
    assert report == FineTuning(**settings).purify(reference, make_data())  # type: ignore[arg-type]
    assert equal_states(model, reference)
    assert set(copies) == {id(model)}, "a teacher was made"


def test_attention_comes_closer_to_the_teachers() -> None:
    teacher = make_model()
    FineTuning([0.1], max_epochs=5).purify(teacher, make_data())
    teacher.eval()

    def distance(beta: float) -> float:
        student = make_model()
        NeuralAttentionDistillation(beta, learning_rates=[0.1], max_epochs=2, teacher_epochs=5).purify(
            student, make_data()
        )
        student.eval()
        images = VALIDATION[0][0]
        with torch.no_grad():
            pairs = zip(student.maps(images), teacher.maps(images), strict=True)
            return sum(float(((attention(ours) - attention(theirs)) ** 2).mean()) for ours, theirs in pairs)

    assert distance(100.0) < 0.8 * distance(0.0)


def make_trained() -> Net:
    model = make_model()
    train_by_hand(model, 0.1, epochs=15)
    assert accuracy(model) > 0.9
    return model


def test_teacher_and_student_choose_their_rates() -> None:
    """At the larger rate so much attention throws the student off, but the teacher has no such term."""
    model = make_trained()
    defense = NeuralAttentionDistillation(
        1e5, learning_rates=(0.0001, 0.1), max_drop=0.1, max_epochs=2, teacher_epochs=2
    )
    report = defense.purify(model, make_data())
    assert (report.values["teacher_learning_rate"], report.values["learning_rate"]) == (0.1, 0.0001)
    assert report.note == "lr 0.0001, teacher lr 0.1, maps of one, two"
    assert report.values["validation_accuracy"] == pytest.approx(accuracy(model))
    assert accuracy(model) >= accuracy(make_trained()) - 0.1


def test_no_rate_keeps_the_accuracy() -> None:
    defense = NeuralAttentionDistillation(1.0, learning_rates=(60.0, 50.0), max_epochs=1, teacher_epochs=1)
    with pytest.warns(UserWarning, match="lost more than 0.01 of clean accuracy at every rate") as caught:
        report = defense.purify(make_trained(), make_data())
    assert [str(warning.message).partition(" ")[0] for warning in caught] == ["Teacher", "Distillation"]
    lost = "points of validation accuracy lost"
    assert re.fullmatch(rf"lr 50, yet [\d.]+ {lost}, teacher lr 50, yet [\d.]+ {lost}, maps of one, two", report.note)


@pytest.mark.parametrize(("limit", "epochs"), [(None, 3), (1, 1), (0, 0)])
def test_the_runs_cap_applies(limit: int | None, epochs: int) -> None:
    model = make_model()
    defense = NeuralAttentionDistillation(learning_rates=[0.05], max_epochs=3, teacher_epochs=3)
    assert defense.purify(model, make_data(limit)).epochs == epochs
    reference = make_model()
    if epochs:
        shorter = NeuralAttentionDistillation(learning_rates=[0.05], max_epochs=epochs, teacher_epochs=epochs)
        shorter.purify(reference, make_data())
    assert equal_states(model, reference)


def test_leaves_no_trace_and_draws_nothing() -> None:
    model = make_model()
    model.two.eval()
    weight = next(model.parameters()).requires_grad_(False)
    frozen = weight.clone()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    NeuralAttentionDistillation(learning_rates=[0.05], max_epochs=1, teacher_epochs=1).purify(model, make_data())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["one.0.weight"]
    assert torch.equal(weight, frozen)
    assert all(layer.momentum == 0.1 for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))


def test_an_exception_leaves_no_hooks_and_modes() -> None:
    model = make_model().eval()
    calls: list[int] = []

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(1)
        if module.training and any(parameter.requires_grad for parameter in module.parameters()) and len(calls) > 12:
            raise RuntimeError("out of memory")

    handle = model.fc.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        NeuralAttentionDistillation(learning_rates=[0.05], teacher_epochs=1).purify(model, make_data())
    handle.remove()
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_is_deterministic() -> None:
    models = [make_model(), make_model()]
    reports = [NeuralAttentionDistillation(max_epochs=2, teacher_epochs=2).purify(m, make_data()) for m in models]
    assert reports[0] == reports[1]
    assert equal_states(*models)


@pytest.mark.parametrize(
    ("make", "maps"),
    [
        (lambda: backbones.preact_resnet18(CLASSES, width=4), "layer2, layer3, layer4"),
        (lambda: backbones.resnet18(CLASSES, width=4), "layer2, layer3, layer4"),
        (lambda: backbones.vgg11_bn(CLASSES, width=4), "features.6, features.13, features.20"),
        (lambda: VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=CLASSES),
         "encoder.layers.encoder_layer_0, encoder.layers.encoder_layer_1"),
    ],
)  # fmt: skip
def test_runs_on_the_usual_networks(make: Callable[[], nn.Module], maps: str) -> None:
    batches = make_batches((8, 8), 3, size=16)
    data = DefenderData(lambda epoch: iter(batches), lambda: iter(batches), CLASSES)
    torch.manual_seed(0)
    model = make()
    before = copy.deepcopy(model)
    defense = NeuralAttentionDistillation(learning_rates=[0.01], max_epochs=1, teacher_epochs=1)
    assert defense.purify(model, data).note == f"lr 0.01, teacher lr 0.01, maps of {maps}"
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    plain = copy.deepcopy(before)
    FineTuning([0.01], max_epochs=1).purify(plain, data)
    # The attention reaches the first layer.
    first, other = (next(net.parameters()) for net in (model, plain))
    assert not torch.equal(first, other)


def test_the_layers_that_the_user_names() -> None:
    by_name, found, other = make_model(), make_model(), make_model()
    settings = {"learning_rates": [0.05], "max_epochs": 2, "teacher_epochs": 2}
    report = NeuralAttentionDistillation(layers=["two.2"], **settings).purify(by_name, make_data())  # type: ignore[arg-type]
    assert report.note.endswith("maps of two.2")
    NeuralAttentionDistillation(stages=1, **settings).purify(found, make_data())  # type: ignore[arg-type]
    NeuralAttentionDistillation(**settings).purify(other, make_data())  # type: ignore[arg-type]
    assert equal_states(by_name, found)
    assert not equal_states(by_name, other)


def test_the_power_matters() -> None:
    models = [make_model(), make_model()]
    for p, model in zip((2.0, 1.0), models, strict=True):
        NeuralAttentionDistillation(p=p, max_epochs=1, teacher_epochs=1).purify(model, make_data())
    assert not equal_states(*models)


def test_not_applicable_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    frozen = make_model().requires_grad_(False)
    for model, settings, error, message in (
        (flat, {}, NotApplicableError, "needs feature maps"),
        (flat, {"beta": 0}, None, ""),
        (frozen, {}, NotApplicableError, "needs feature maps"),
        (frozen, {"layers": ["two"]}, NotApplicableError, "Every parameter is frozen"),
        (make_model(), {"layers": ["fc"]}, NotApplicableError, "layer `fc` must be feature maps"),
        (make_model(), {"layers": ["three"]}, MisconfigurationException, "Change `three` in `layers`"),
    ):
        before = copy.deepcopy(model)
        defense = NeuralAttentionDistillation(max_epochs=1, teacher_epochs=1, **settings)
        if error is None:
            defense.purify(model, make_data())
            continue
        with pytest.raises(error, match=message):
            defense.purify(model, make_data())
        assert equal_states(model, before)


def test_a_trainer_runs_it_like_a_call_by_hand(tmp_path: Path) -> None:
    """The model hangs on a Trainer when it is copied."""

    def make() -> BackdoorClassifier:
        torch.manual_seed(0)
        return BackdoorClassifier(backbones.small_cnn(10, in_channels=1, width=4), num_classes=10)

    view = DigitsDataModule(splits={"defend": 0.1, "rest": 0.9}).defender_view(
        PhaseData("defend", ("defend",), batch_size=32)
    )
    defenses = [NeuralAttentionDistillation(learning_rates=[0.05], max_epochs=2, teacher_epochs=2) for _ in range(2)]
    module, twin = make(), make()
    Trainer(
        accelerator="cpu", max_epochs=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, callbacks=[defenses[0]], default_root_dir=tmp_path,
    ).fit(module, datamodule=view)  # fmt: skip
    report = defenses[1].purify(
        twin, DefenderData(lambda epoch: view.batches("train", epoch=epoch), lambda: view.batches("validation"), 10)
    )
    assert defenses[0].report == report
    assert report.note.endswith("maps of backbone.features.2, backbone.features")
    assert equal_states(module, twin)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, "`beta` to be a non-negative float, but got -1.0."),
        ({"beta": float("nan")}, "`beta` to be a non-negative float, but got nan."),
        ({"stages": 0}, "`stages` to be a positive integer, but got 0."),
        ({"layers": []}, "`layers` to be distinct names or None, but got []."),
        ({"layers": ["a", "a"]}, "`layers` to be distinct names or None, but got ['a', 'a']."),
        ({"layers": "layer4"}, "`layers` to be distinct names or None, but got 'layer4'."),
        ({"p": 0.5}, "`p` to be a finite number of at least 1, but got 0.5."),
        ({"p": float("inf")}, "`p` to be a finite number of at least 1, but got inf."),
        ({"teacher_epochs": 0}, "`teacher_epochs` to be a positive integer, but got 0."),
        ({"max_epochs": 0}, "`max_epochs` to be a positive integer, but got 0."),
        ({"learning_rates": []}, "`learning_rates` to be positive numbers, but got []."),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {re.escape(message)}"):
        NeuralAttentionDistillation(**settings)


def test_removes_badnets_with_the_shipped_settings(attacked_small_cnn: Attacked) -> None:
    phase = yaml.safe_load((CONFIGS / "nad.yaml").read_text(encoding="utf-8"))
    assert phase["max_epochs"] == 0
    (callback,) = phase["callbacks"]
    assert callback["class_path"] == "lightning_bd.callbacks.NeuralAttentionDistillation"
    model = attacked_small_cnn.model()
    NeuralAttentionDistillation(**callback["init_args"]).purify(model, attacked_small_cnn.data)
    attacked_small_cnn.check_removed(model)


@pytest.mark.slow
def test_removes_badnets_from_a_residual_network(attacked_resnet: Attacked) -> None:
    model = attacked_resnet.model()
    NeuralAttentionDistillation().purify(model, attacked_resnet.data)
    attacked_resnet.check_removed(model)
