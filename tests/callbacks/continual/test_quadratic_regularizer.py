"""What a later fit builds on: several tasks with one object, with several, cut, resumed and failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.continual.elastic_weight_consolidation import ElasticWeightConsolidation
from lightning_bd.callbacks.continual.importance import accumulate
from lightning_bd.callbacks.continual.memory_aware_synapses import MemoryAwareSynapses
from lightning_bd.callbacks.continual.quadratic_regularizer import QuadraticRegularizer
from lightning_bd.callbacks.continual.synaptic_intelligence import SynapticIntelligence
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.functional.fisher import fisher_diagonal
from lightning_bd.functional.memory_aware import memory_aware_importance
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

if TYPE_CHECKING:
    from tests.callbacks.conftest import Lab

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]
Make = Callable[[int], QuadraticRegularizer]
GAMMA = 0.5


def make_batches(task: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(task)
    images = torch.randn(4, 8, 6, generator=generator)
    return list(zip(images, torch.randint(3, (4, 8), generator=generator), strict=True))


def make_loader(task: int) -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(task), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


class Module(LightningModule):
    """A user's module."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_ewc(task: int) -> QuadraticRegularizer:
    """Protects the task before."""
    return ElasticWeightConsolidation(5.0, dataloader=make_batches(task - 1), gamma=GAMMA)


def make_mas(task: int) -> QuadraticRegularizer:
    return MemoryAwareSynapses(0.3, dataloader=make_batches(task - 1), gamma=GAMMA)


def make_si(task: int) -> QuadraticRegularizer:
    return SynapticIntelligence(3.0)


all_of_them = pytest.mark.parametrize("make", [make_ewc, make_mas, make_si])


def make_trainer(*callbacks: Callback, epochs: int = 2) -> Trainer:
    return Trainer(
        callbacks=list(callbacks), max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip


def reuse(callback: QuadraticRegularizer, task: int) -> None:
    """Give an object that is fitted again the data of the next task."""
    if isinstance(callback, ElasticWeightConsolidation | MemoryAwareSynapses):
        callback.dataloader = make_batches(task - 1)


def three_tasks(make: Make) -> tuple[Module, QuadraticRegularizer]:
    module, callback = Module(), make(1)
    for task in (1, 2, 3):
        reuse(callback, task)
        make_trainer(callback).fit(module, make_loader(task))
    return module, callback


def assert_equal(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert torch.equal(first[name], tensor), name


def assert_equal_callbacks(first: QuadraticRegularizer, second: QuadraticRegularizer) -> None:
    for key, tensors in second.state_dict().items():
        assert_equal(first.state_dict()[key], tensors)
    assert_equal(first.carried_state()["carried"], second.carried_state()["carried"])


@pytest.mark.parametrize("make", [make_ewc, make_mas])
def test_importance_decays_and_the_anchor_moves(make: Make) -> None:
    """Three fits of one object: F3 = g (g F1 + F2) + F3, each measured where its fit starts."""
    measure: Callable[..., Tensors] = fisher_diagonal if make is make_ewc else memory_aware_importance
    module, callback = Module(), make(1)
    running: Tensors = {}
    for task in (1, 2, 3):
        new = measure(module, make_batches(task - 1))
        running = {name: GAMMA * running[name] + tensor if running else tensor for name, tensor in new.items()}
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        reuse(callback, task)
        make_trainer(callback).fit(module, make_loader(task))
        state = callback.state_dict()
        assert_equal(state["anchor"], weights)
        key = "fisher" if make is make_ewc else "importance"
        for name, tensor in running.items():
            torch.testing.assert_close(state[key][name], tensor)
        assert_equal(callback.carried_state()["carried"], state[key])


def test_the_penalty_is_that_of_the_running_importance() -> None:
    """The third fit against plain PyTorch."""
    module, callback = Module(), make_ewc(1)
    for task in (1, 2):
        reuse(callback, task)
        make_trainer(callback).fit(module, make_loader(task))
    by_hand = Module()
    by_hand.load_state_dict(module.state_dict())
    reuse(callback, 3)
    make_trainer(callback).fit(module, make_loader(3))
    state = callback.state_dict()
    opt = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for images, labels in make_batches(3) * 2:
        terms = [(state["fisher"][n] * (p - state["anchor"][n]) ** 2).sum() for n, p in by_hand.named_parameters()]
        opt.zero_grad()
        loss = F.cross_entropy(by_hand(images), labels) + 5.0 * torch.stack(terms).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
    for actual, expected in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@all_of_them
def test_another_object_goes_on_from_a_file(make: Make, tmp_path: Path) -> None:
    """As phases do, each with callbacks of its own."""
    module, state = Module(), None
    for task in (1, 2, 3):
        callback = make(task)
        if state is not None:
            callback.carry_over(state)
        make_trainer(callback).fit(module, make_loader(task))
        torch.save(callback.carried_state(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    expected, same = three_tasks(make)
    assert_equal(dict(module.named_parameters()), dict(expected.named_parameters()))
    assert_equal_callbacks(callback, same)


class FailsInSecondEpoch(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise OSError("cut")


@all_of_them
@pytest.mark.parametrize("who", ["same object", "new object", "new object with carried state"])
def test_a_cut_fit_counts_once_when_it_is_resumed(lab: Lab, make: Make, who: str, tmp_path: Path) -> None:
    expected, reference = three_tasks(make)
    module, callback, path = Module(), make(1), tmp_path / "first.ckpt"
    make_trainer(callback).fit(module, make_loader(1))
    carried = callback.carried_state()
    reuse(callback, 2)
    with pytest.raises(OSError, match="cut"):
        make_trainer(callback, FailsInSecondEpoch(), lab.saves_first_epoch(path)).fit(module, make_loader(2))
    if who != "same object":
        callback, module = make(2), Module()
    if who.endswith("carried state"):
        callback.carry_over(carried)
    make_trainer(callback).fit(module, make_loader(2), ckpt_path=path, weights_only=True)
    reuse(callback, 3)
    make_trainer(callback).fit(module, make_loader(3))
    assert_equal(dict(module.named_parameters()), dict(expected.named_parameters()))
    assert_equal_callbacks(callback, reference)


@all_of_them
def test_a_failed_fit_that_starts_over_does_not_count(make: Make) -> None:
    expected, reference = three_tasks(make)
    module, callback = Module(), make(1)
    for task in (1, 2, 3):
        reuse(callback, task)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(OSError, match="cut"):
            make_trainer(callback, FailsInSecondEpoch()).fit(module, make_loader(task))
        module.load_state_dict(before)
        make_trainer(callback).fit(module, make_loader(task))
    assert_equal(dict(module.named_parameters()), dict(expected.named_parameters()))
    assert_equal_callbacks(callback, reference)


@pytest.mark.parametrize("kind", [ElasticWeightConsolidation, MemoryAwareSynapses])
def test_without_gamma_earlier_fits_are_forgotten(
    kind: type[ElasticWeightConsolidation | MemoryAwareSynapses],
) -> None:
    def run(callback: QuadraticRegularizer) -> QuadraticRegularizer:
        make_trainer(callback, epochs=1).fit(Module(), make_loader(1))
        return callback

    expected = run(kind(0.1, dataloader=make_batches(0)))
    carries = kind(0.1, dataloader=make_batches(0))
    carries.carry_over(run(make_si(1)).carried_state())
    twice = run(run(kind(0.1, dataloader=make_batches(0))))
    nothing_left = kind(0.1, dataloader=make_batches(0), gamma=0.0)
    nothing_left.carry_over(expected.carried_state())
    for callback in (run(carries), twice, run(nothing_left)):
        assert_equal_callbacks(callback, expected)


def test_strength_zero_passes_on_what_it_was_given() -> None:
    callback = ElasticWeightConsolidation(0.0, gamma=GAMMA)
    assert callback.carried_state() == {"carried": {}}
    state = {"carried": {"net.0.bias": torch.ones(5)}}
    callback.carry_over(state)
    make_trainer(callback, epochs=1).fit(Module(), make_loader(1))
    assert callback.carried_state() == state


@all_of_them
def test_a_layer_that_is_frozen_for_one_task(make: Make) -> None:
    module, callback = Module(), make(1)
    make_trainer(callback).fit(module, make_loader(1))
    first = callback.carried_state()["carried"]["net.0.weight"]
    weight = module.net.state_dict()["0.weight"].clone()
    module.net[0].requires_grad_(False)
    reuse(callback, 2)
    make_trainer(callback).fit(module, make_loader(2))
    assert torch.equal(module.net.state_dict()["0.weight"], weight)
    kept = callback.carried_state()["carried"]["net.0.weight"]
    assert torch.equal(kept, first if make is make_si else GAMMA * first)
    module.net[0].requires_grad_(True)
    reuse(callback, 3)
    make_trainer(callback).fit(module, make_loader(3))
    assert torch.equal(callback.state_dict()["anchor"]["net.0.weight"], weight)


@all_of_them
def test_the_importance_of_another_model_is_refused(make: Make) -> None:
    callback = make(1)
    callback.carry_over({"carried": {"net.0.weight": torch.ones(5, 6)}})
    message = r"another model: 'net.0.weight' has shape \(5, 6\), but here shape \(7, 6\). Use a new callback"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callback).fit(Module(width=7), make_loader(1))
    callback.carry_over({"carried": {"head.weight": torch.ones(2)}})
    with pytest.raises(MisconfigurationException, match=r"'head.weight' has shape \(2,\), but here no such parameter"):
        make_trainer(callback).fit(Module(), make_loader(1))


@all_of_them
def test_other_states_are_refused(make: Make) -> None:
    callback = make(1)
    with pytest.raises(ValueError, match=r"what `carried_state\(\)` returned, .* but got the keys \['anchor', "):
        callback.carry_over(callback.state_dict())


def test_accumulate() -> None:
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    total = accumulate({"a": first, "b": second}, {"b": first, "c": second}, 0.25)
    expected = {"a": first, "b": torch.tensor([3.25, 5.5]), "c": torch.tensor([0.75, 1.25])}
    assert_equal({name: total[name] for name in "abc"}, expected)
    assert torch.equal(first, torch.tensor([1.0, 2.0]))
    assert torch.equal(second, torch.tensor([3.0, 5.0]))


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize(
    ("kind", "measure"),
    [(ElasticWeightConsolidation, fisher_diagonal), (MemoryAwareSynapses, memory_aware_importance)],
)
def test_the_reference_holds_the_triggers_unless_it_is_clean(
    kind: type[ElasticWeightConsolidation | MemoryAwareSynapses], measure: Callable[..., Tensors]
) -> None:
    """Half of the previous phase's images have a white corner, which weighs on the weights of those pixels."""
    poison = Poison(BadNets(size=2, pattern="white"), 0.5)
    data = DigitsDataModule(poison, {"inject": 0.5, "consolidate": 0.5}, 64, batch_format="pair", seed=0)
    inject = PhaseData("inject", ("inject",), "dynamic")
    data.set_phase(PhaseData("consolidate", ("consolidate",)), reference=inject)
    seen: dict[str, Any] = {}
    callbacks = {"default": kind(0.01), "as_trained": kind(0.01, reference="as_trained")}
    for name, callback in {**callbacks, "clean": kind(0.01, reference="clean")}.items():
        make_trainer(callback, epochs=1).fit(Classifier(), datamodule=data)
        seen[name] = callback.state_dict()[callback.importance_key]
    assert_equal(seen["default"], seen["as_trained"])
    for reference, clean in (("as_trained", False), ("clean", True)):
        batches = [(batch[0], batch[1]) for batch in data.reference_batches(clean=clean)]
        white = torch.cat([(x[:, :, -2:, -2:] == 1).all(dim=(1, 2, 3)) for x, _ in batches]).double().mean()
        assert white == pytest.approx(0.0 if clean else 0.5, abs=0.06)
        for name, tensor in measure(Classifier(), batches).items():
            torch.testing.assert_close(seen[reference][name], tensor)
    corner = [tensor["net.1.weight"].view(10, 8, 8)[:, -1, -1].sum() for tensor in (seen["clean"], seen["as_trained"])]
    assert corner[1] > 3 * corner[0]
