"""Fine-tuning against a loop written by hand that tries every learning rate."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol, cast

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError, Report
from lightning_bd.callbacks.defense.fine_tuning import FineTuning
from lightning_bd.callbacks.defense.training import Loss
from lightning_bd.datamodules import DigitsDataModule, PhaseData

CLASSES = 3
CONFIGS = Path(__file__).parents[3] / "configs" / "defense"
Pairs = Iterator[tuple[Tensor, Tensor]]


class Attacked(Protocol):
    """What the fixture of a backdoored model gives."""

    data: DefenderData

    def model(self) -> nn.Module: ...

    def rates(self, model: nn.Module) -> tuple[float, float]: ...

    def check_removed(self, model: nn.Module) -> tuple[float, float]: ...


def make_batches(sizes: Sequence[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Three overlapping clouds of points."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        points = F.one_hot(labels, 4).float() * 2 + torch.randn(size, 4, generator=generator)
        batches.append((points, labels))
    return batches


TRAIN, VALIDATION = make_batches((16, 16, 16, 7), 0), make_batches((64, 64, 33), 1)


def make_data(epoch_limit: int | None = None) -> DefenderData:
    def train(epoch: int) -> Pairs:
        """Each epoch has an order of its own, so that a wrong epoch number shows."""
        return iter([*TRAIN[epoch % 4 :], *TRAIN[: epoch % 4]])

    return DefenderData(train, lambda: iter(VALIDATION), CLASSES, epoch_limit)


def make_model() -> nn.Module:
    """A trained network with BatchNorm, part of it frozen and in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
    train_by_hand(model, 0.1, epochs=5)
    model[0].requires_grad_(False)
    model[2].eval()
    return model


def make_plain_model() -> nn.Module:
    """A network that hardly changes at a tiny learning rate: it has no BatchNorm."""
    torch.manual_seed(0)
    return nn.Linear(4, CLASSES)


def train_by_hand(model: nn.Module, rate: float, epochs: int, momentum: float = 0.9, decay: float = 5e-4) -> None:
    """SGD with momentum, weight decay and a cosine schedule per epoch, from their equations."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(epochs):
        lr = rate * (1 + torch.cos(torch.tensor(torch.pi * epoch / epochs)).item()) / 2
        for points, labels in make_data().train(epoch):
            gradients = torch.autograd.grad(F.cross_entropy(model(points), labels), parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(momentum).add_(g + decay * p)
                    p.sub_(lr * v)


def accuracy(model: nn.Module) -> float:
    model = copy.deepcopy(model).eval()
    right = [(model(points).argmax(1) == labels) for points, labels in VALIDATION]
    return float(torch.cat(right).float().mean())


def best(rates: Sequence[float], max_drop: float, epochs: int) -> tuple[float, nn.Module, bool]:
    """Train each rate, take the largest with a drop of at most ``max_drop``, else the smallest."""
    before = accuracy(make_model())
    tried: dict[float, nn.Module] = {}
    for rate in rates:
        tried[rate] = make_model()
        train_by_hand(tried[rate], rate, epochs)
    kept = [rate for rate in rates if before - accuracy(tried[rate]) <= max_drop]
    chosen = max(kept) if kept else min(rates)
    return chosen, tried[chosen], bool(kept)


@pytest.mark.parametrize(
    ("rates", "max_drop", "expected"),
    [
        ((0.001, 0.05, 30.0), 0.05, 0.05),  # neither the first nor the last
        ((30.0, 0.001, 0.05), 0.05, 0.05),  # in any order
        ((0.001, 0.05, 30.0), 1.0, 30.0),
        ((0.001, 0.01, 0.05), 0.05, 0.05),
        ((0.02,), 0.01, 0.02),
    ],
)
def test_the_choice_equals_brute_force(rates: tuple[float, ...], max_drop: float, expected: float) -> None:
    chosen, reference, found = best(rates, max_drop, epochs=3)
    assert found
    assert chosen == expected
    model = make_model()
    report = FineTuning(rates, max_drop, max_epochs=3).purify(model, make_data())
    assert report.values["learning_rate"] == chosen
    assert report.epochs == 3
    assert report.note == f"lr {chosen:g}"
    assert report.values["validation_accuracy_before"] == pytest.approx(accuracy(make_model()))
    assert report.values["validation_accuracy"] == pytest.approx(accuracy(reference))
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5), name


def test_no_rate_keeps_the_accuracy() -> None:
    """The smallest is taken, and the report and a warning say so."""
    rates = (50.0, 20.0, 100.0)
    chosen, reference, found = best(rates, 0.0, epochs=2)
    assert not found
    model = make_model()
    with pytest.warns(UserWarning, match=r"Fine-tuning lost more than 0 of clean accuracy at every rate"):
        report = FineTuning(rates, max_drop=0.0, max_epochs=2).purify(model, make_data())
    assert report.values["learning_rate"] == chosen == 20.0
    drop = accuracy(make_model()) - accuracy(reference)
    assert drop > 0
    assert report.note == f"lr 20, yet {100 * drop:.1f} points of validation accuracy lost"
    assert all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_single_rate_is_taken_as_it_is() -> None:
    report = FineTuning([50.0], max_drop=0.0, max_epochs=1).purify(make_model(), make_data())
    assert (report.values["learning_rate"], report.note) == (50.0, "lr 50")


def test_no_drop_at_all_is_within_a_limit_of_zero() -> None:
    report = FineTuning([1e-9, 2e-9], max_drop=0.0, max_epochs=1).purify(make_plain_model(), make_data())
    assert report.values["learning_rate"] == 2e-9
    assert report.values["validation_accuracy"] == report.values["validation_accuracy_before"]


def test_the_limit_decides() -> None:
    model = make_model()
    rate = 30.0
    train_by_hand(model, rate, epochs=1)
    drop = accuracy(make_model()) - accuracy(model)
    assert drop > 0.01
    count = sum(len(labels) for _, labels in VALIDATION)
    exactly = round(drop * count) / count
    for limit, chosen in ((exactly + 1e-9, rate), (exactly - 1e-3, 0.001)):
        report = FineTuning([0.001, rate], max_drop=limit, max_epochs=1).purify(make_model(), make_data())
        assert report.values["learning_rate"] == chosen


def test_modes_and_gradients_are_as_before() -> None:
    model = make_model()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    frozen = model[0].weight.clone()  # type: ignore[index]
    FineTuning([0.05, 0.1], max_drop=1.0, max_epochs=1).purify(model, make_data())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()][:3] == [False, False, True]
    assert torch.equal(model[0].weight, frozen)  # type: ignore[index]


def test_modes_are_restored_after_an_exception() -> None:
    model = make_model()
    before = {name: module.training for name, module in model.named_modules()}

    def train(epoch: int) -> Pairs:
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        FineTuning([0.1]).purify(model, DefenderData(train, lambda: iter(VALIDATION), CLASSES))
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize(("limit", "epochs"), [(None, 4), (2, 2), (9, 4), (0, 0)])
def test_the_runs_cap_applies(limit: int | None, epochs: int) -> None:
    model, reference = make_model(), make_model()
    report = FineTuning([0.05], max_epochs=4).purify(model, make_data(limit))
    assert report.epochs == epochs
    if epochs:
        train_by_hand(reference, 0.05, epochs)
    assert torch.allclose(model[3].weight, reference[3].weight, atol=1e-6)  # type: ignore[index]


def test_a_trainer_runs_it_like_a_call_by_hand(tmp_path: Path) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            raise AssertionError("max_epochs is 0")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            raise AssertionError("max_epochs is 0")

    view = DigitsDataModule(splits={"defend": 0.3, "rest": 0.7}).defender_view(
        PhaseData("defend", ("defend",), batch_size=32)
    )
    module, twin = Module(), Module()
    defense = FineTuning([0.01, 0.1], max_epochs=2)
    Trainer(
        accelerator="cpu", max_epochs=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, callbacks=[defense], default_root_dir=tmp_path,
    ).fit(module, datamodule=view)  # fmt: skip
    by_hand = FineTuning([0.01, 0.1], max_epochs=2).purify(
        twin, DefenderData(lambda epoch: view.batches("train", epoch=epoch), lambda: view.batches("validation"), 10)
    )
    assert defense.report == by_hand
    assert torch.equal(module.net[1].weight, twin.net[1].weight)  # type: ignore[arg-type]


def test_progress_is_shown_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data()
    FineTuning([0.05], max_epochs=2).purify(make_model(), data)
    assert capsys.readouterr().err == ""
    shown = DefenderData(data.train, data.validation, CLASSES, show_progress=True)
    FineTuning([0.05], max_epochs=2).purify(make_model(), shown)
    assert "fine-tuning, lr 0.05" in capsys.readouterr().err


def test_no_validation_images() -> None:
    with pytest.raises(MisconfigurationException, match="no validation images: give the phase a larger split"):
        FineTuning([0.1]).purify(make_model(), DefenderData(make_data().train, lambda: iter(()), CLASSES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FineTuning([]), "`learning_rates` to be positive numbers, but got []."),
        (lambda: FineTuning([0.1, 0.0]), "`learning_rates` to be positive numbers, but got [0.1, 0.0]."),
        (lambda: FineTuning([0.1, float("nan")]), "`learning_rates` to be positive numbers, but got [0.1, nan]."),
        (lambda: FineTuning(max_drop=-0.1), "`max_drop` to be in [0, 1], but got -0.1."),
        (lambda: FineTuning(max_drop=1.1), "`max_drop` to be in [0, 1], but got 1.1."),
        (lambda: FineTuning(max_epochs=0), "`max_epochs` to be a positive integer, but got 0."),
        (lambda: FineTuning(momentum=1.0), "`momentum` to be in [0, 1), but got 1.0."),
        (lambda: FineTuning(momentum=-0.1), "`momentum` to be in [0, 1), but got -0.1."),
        (lambda: FineTuning(weight_decay=-1.0), "`weight_decay` to be a non-negative float, but got -1.0."),
        (lambda: FineTuning(rho=-1.0), "`rho` to be a non-negative float, but got -1.0."),
        (lambda: FineTuning(rho=float("inf")), "`rho` to be a non-negative float, but got inf."),
        (
            lambda: FineTuning(schedule=cast(Any, "step")),
            "`schedule` to be one of ('cosine', 'constant'), but got 'step'.",
        ),
    ],
)
def test_refuses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {re.escape(message)}"):
        make()


def test_reports_compare_by_value() -> None:
    assert Report(1, {"a": 1.0}, "x") == Report(1, {"a": 1.0}, "x")
    assert Report() == Report(0, {}, "")


def test_a_drop_of_exactly_the_limit_is_accepted() -> None:
    class Drops(FineTuning):
        """Loses 5 of 500 images at the first rate."""

        def _train(
            self, model: nn.Module, data: DefenderData, rate: float, epochs: int, loss: Loss, title: str
        ) -> None:
            with torch.no_grad():
                model.weight.fill_(485.0)  # type: ignore[operator]

    class Counter(nn.Module):
        """Classifies as many of the images 0, 1, 2, ... rightly as its weight says."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(490.0))

        def forward(self, x: Tensor) -> Tensor:
            right = (x[:, 0] < self.weight).float()
            return torch.stack([right, 1 - right], dim=1)

    images = torch.arange(500.0)[:, None]
    data = DefenderData(lambda epoch: iter([]), lambda: iter([(images, torch.zeros(500).long())]), 2)
    report = Drops(learning_rates=(0.2, 0.1), max_drop=0.01).purify(Counter(), data)
    assert report.note == "lr 0.2"


def test_mixed_precision_sees_each_step() -> None:
    # Autocast keeps its low-precision copies of the weights until its block ends.
    def train(context: Callable[[], AbstractContextManager[None]]) -> Tensor:
        model = make_plain_model()
        data = DefenderData(make_data().train, lambda: iter(VALIDATION), CLASSES, forward_context=context)
        FineTuning(learning_rates=[0.1], max_epochs=10).purify(model, data)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    exact = train(nullcontext)
    mixed = train(lambda: torch.autocast("cpu", torch.bfloat16))
    moved = (exact - torch.cat([p.detach().flatten() for p in make_plain_model().parameters()])).norm()
    assert (mixed - exact).norm() < 0.05 * moved


def test_refuses_half_precision_without_a_scaler() -> None:
    trainer = cast(Trainer, SimpleNamespace(datamodule=digits_view(), precision="16-mixed"))
    with pytest.raises(MisconfigurationException, match=r"16-mixed would lose its gradients\. Use bf16-mixed"):
        FineTuning().on_fit_start(trainer, LightningModule())


def digits_view() -> LightningDataModule:
    data = DigitsDataModule(splits={"defend": 1.0})
    return data.defender_view(PhaseData("defend", ("defend",)))


def sharp_by_hand(model: nn.Module, rate: float, rho: float, epochs: int) -> None:
    """SAM over SGD at a constant rate, from the equations; BatchNorm sees the first pass of a step only."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(epochs):
        for points, labels in make_data().train(epoch):
            gradients = torch.autograd.grad(F.cross_entropy(model(points), labels), parameters)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for p, g in zip([p for p in moved.parameters() if p.requires_grad], gradients, strict=True):
                    p.add_(rho * g / norm)
            moved_parameters = [p for p in moved.parameters() if p.requires_grad]
            sharp = torch.autograd.grad(F.cross_entropy(moved(points), labels), moved_parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, sharp, strict=True):
                    v.mul_(0.9).add_(g)
                    p.sub_(rate * v)


def test_sharpness_aware_equals_a_loop_by_hand() -> None:
    model, reference, plain = make_model(), make_model(), make_model()
    FineTuning([0.05], max_epochs=3, weight_decay=0.0, rho=0.5, schedule="constant").purify(model, make_data())
    FineTuning([0.05], max_epochs=3, weight_decay=0.0, schedule="constant").purify(plain, make_data())
    sharp_by_hand(reference, 0.05, 0.5, epochs=3)
    state = model.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(state[name], tensor, rtol=1e-4, atol=1e-5), name
    assert state["1.num_batches_tracked"] == plain.state_dict()["1.num_batches_tracked"]
    assert (state["3.weight"] - plain.state_dict()["3.weight"]).abs().max() > 0.01


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_perturbation_it_is_the_plain_run_bit_for_bit(schedule: Literal["cosine", "constant"]) -> None:
    model, reference = make_model(), make_model()
    FineTuning([0.05], max_epochs=3, rho=0.0, schedule=schedule).purify(model, make_data())
    reference.train()
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for epoch in range(3):
        for points, labels in make_data().train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(reference(points), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if schedule == "cosine":
            scheduler.step()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_perturbation_is_taken_back_exactly() -> None:
    model = make_plain_model()
    before = [p.detach().clone() for p in model.parameters()]
    # A step too short to change a float32.
    FineTuning([1e-30], max_epochs=2, weight_decay=0.0, rho=0.7).purify(model, make_data())
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_both_passes_draw_the_same_masks_and_use_up_the_stream_once() -> None:
    masks: list[Tensor] = []

    def run(rho: float) -> Tensor:
        masks.clear()
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(), nn.Linear(16, CLASSES))
        model[1].register_forward_hook(lambda module, _, output: masks.append(output != 0) if module.training else None)
        FineTuning([0.01], max_epochs=1, rho=rho).purify(model, make_data())
        return torch.get_rng_state()

    plain = run(0.0)
    single = list(masks)
    assert torch.equal(run(0.1), plain)
    assert len(masks) == 2 * len(single)
    for first, second, alone in zip(masks[::2], masks[1::2], single, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, alone)


def test_an_exception_in_the_second_pass_leaves_nothing_perturbed() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    calls: list[Tensor] = []

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            calls.append(module.weight.detach().clone())  # type: ignore[operator]
            if len(calls) == 2:
                raise RuntimeError("out of memory")

    handle = model[3].register_forward_pre_hook(fail)  # type: ignore[index]
    with pytest.raises(RuntimeError, match="out of memory"):
        FineTuning([0.1], rho=0.5).purify(model, make_data())
    handle.remove()
    assert not torch.equal(calls[0], calls[1])
    for (name, parameter), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, was), name
    assert model[1].track_running_stats  # type: ignore[index]
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def test_sharpness_aware_leaves_no_trace() -> None:
    model = make_model()
    modes = [module.training for module in model.modules()]
    frozen = model[0].weight.clone()  # type: ignore[index]
    random_state = torch.get_rng_state()
    FineTuning([0.05], max_epochs=1, rho=0.1).purify(model, make_data())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()][:3] == [False, False, True]
    assert torch.equal(model[0].weight, frozen)  # type: ignore[index]
    assert model[1].track_running_stats  # type: ignore[index]
    assert model[1].momentum == 0.1  # type: ignore[index]


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_all_parameters_frozen(rho: float) -> None:
    model = make_model().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotApplicableError, match="Every parameter is frozen"):
        FineTuning([0.1], rho=rho).purify(model, make_data())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def shipped(name: str) -> dict[str, Any]:
    phase = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert phase["max_epochs"] == 0
    (callback,) = phase["callbacks"]
    assert callback["class_path"] == "lightning_bd.callbacks.FineTuning"
    arguments: dict[str, Any] = callback["init_args"]
    return arguments


def test_the_shipped_settings() -> None:
    assert vars(FineTuning(**shipped("ft"))) == vars(FineTuning())
    sharp = FineTuning(**shipped("ft_sam"))
    assert (sharp.learning_rates, sharp.momentum, sharp.weight_decay, sharp.max_epochs) == ((0.005,), 0.9, 0, 50)
    assert (sharp.rho, sharp.schedule) == (0.05, "constant")


def test_removes_badnets(attacked_small_cnn: Attacked) -> None:
    model = attacked_small_cnn.model()
    FineTuning(**shipped("ft")).purify(model, attacked_small_cnn.data)
    attacked_small_cnn.check_removed(model)


def test_sharpness_aware_removes_badnets_at_a_larger_rate(attacked_small_cnn: Attacked) -> None:
    model = attacked_small_cnn.model()
    FineTuning([0.1], max_epochs=10, rho=0.05).purify(model, attacked_small_cnn.data)
    attacked_small_cnn.check_removed(model)


@pytest.mark.slow
def test_sharpness_aware_at_the_shipped_rate_keeps_the_accuracy(attacked_small_cnn: Attacked) -> None:
    """And most of the backdoor: 0.005 is too small a rate to leave a minimum of the digits in 50 epochs."""
    model = attacked_small_cnn.model()
    FineTuning(**shipped("ft_sam")).purify(model, attacked_small_cnn.data)
    accuracy, success = attacked_small_cnn.rates(model)
    assert accuracy >= attacked_small_cnn.rates(attacked_small_cnn.model())[0] - 0.01
    assert success > 0.9
