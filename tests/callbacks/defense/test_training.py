"""What defenses share that train: what they draw, leave behind, leave out and refuse."""

import copy
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_bd import backbones
from lightning_bd.callbacks.defense.adversarial_neuron_pruning import AdversarialNeuronPruning
from lightning_bd.callbacks.defense.base import DefenderData, Defense, Report
from lightning_bd.callbacks.defense.batch_norm_pruning import BatchNormPruning
from lightning_bd.callbacks.defense.entropy_pruning import EntropyPruning
from lightning_bd.callbacks.defense.fine_pruning import FinePruning
from lightning_bd.callbacks.defense.fine_tuning import FineTuning
from lightning_bd.callbacks.defense.implicit_backdoor_adversarial_unlearning import (
    ImplicitBackdoorAdversarialUnlearning,
)
from lightning_bd.callbacks.defense.neural_attention_distillation import NeuralAttentionDistillation
from lightning_bd.callbacks.defense.training import train, training_batches

Pairs = Iterator[tuple[Tensor, Tensor]]


def make_batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(size, 1, 8, 8, generator=generator), torch.arange(size) % 10) for size in sizes]


def make_data(*sizes: int, epoch_limit: int | None = None) -> DefenderData:
    batches = make_batches(*sizes)
    return DefenderData(lambda epoch: iter(batches), lambda: iter(make_batches(16)), 10, epoch_limit)


def make_cnn() -> nn.Module:
    torch.manual_seed(0)
    return backbones.small_cnn(10, in_channels=1).eval()


def make_dropout() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(), nn.Linear(16, 10))


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def test_dropout_depends_on_no_global_seed_and_leaves_it_alone() -> None:
    trained = []
    for seed in (1, 2):
        model = make_dropout()
        torch.manual_seed(seed)
        random = torch.get_rng_state()
        train(model, make_data(8, 8), 2, sgd(model))
        assert torch.equal(torch.get_rng_state(), random)
        trained.append(state(model))
    assert equal(*trained)


def test_dropout_differs_between_epochs_and_not_with_where_they_begin() -> None:
    masks: list[Tensor] = []
    model = make_dropout()
    model[2].register_forward_hook(lambda _, inputs, output: masks.append((output != 0) | (inputs[0] == 0)))
    train(model, make_data(8, 8), 2, sgd(model))
    train(model, make_data(8, 8), 1, sgd(model), first_epoch=1)
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(masks[2], masks[4])
    assert torch.equal(masks[3], masks[5])


def test_a_rejected_candidate_changes_no_masks() -> None:
    # A rate of 1e6 leaves nothing of the network.
    data = make_data(16, 16)
    alone, after = make_dropout(), make_dropout()
    train(alone, data, 30, sgd(alone))
    after.load_state_dict(state(alone))
    FineTuning([0.01], max_epochs=2).purify(alone, data)
    report = FineTuning([0.01, 1e6], max_drop=0.0, max_epochs=2).purify(after, data)
    assert report.values["learning_rate"] == 0.01
    assert equal(state(alone), state(after))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FineTuning([0.01], max_epochs=1),
        lambda: NeuralAttentionDistillation(max_epochs=1, teacher_epochs=1),
        lambda: AdversarialNeuronPruning(iterations=2),
    ],
    ids=["ft", "nad", "anp"],
)
def test_no_training_images(make: Callable[[], Defense]) -> None:
    with pytest.raises(MisconfigurationException, match="no training images: give the phase a larger split"):
        make().purify(make_cnn(), make_data())


@pytest.mark.parametrize(
    "make",
    [
        FineTuning,
        NeuralAttentionDistillation,
        FinePruning,
        AdversarialNeuronPruning,
        ImplicitBackdoorAdversarialUnlearning,
    ],
)
def test_a_cap_of_no_epochs_does_nothing(make: Callable[[], Defense]) -> None:
    model, defense = make_cnn(), make()
    report = defense.purify(model, make_data(8, epoch_limit=0))
    assert report == Report(note="not run: the run's cap on epochs is 0")
    assert equal(state(model), state(make_cnn()))
    assert list(defense.stages(model, report)) == []


def test_pruning_alone_needs_no_epochs() -> None:
    assert FinePruning(epochs=0).purify(make_cnn(), make_data(8, epoch_limit=0)).note.endswith("channels pruned")


@pytest.mark.parametrize(
    "make", [lambda: FineTuning([0.01]), lambda: ImplicitBackdoorAdversarialUnlearning(ascent_epochs=1)]
)
def test_an_exception_leaves_no_gradients_and_no_draws(make: Callable[[], Defense]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    model = make_cnn()
    handle = register_optimizer_step_pre_hook(fail)
    random = torch.get_rng_state()
    try:
        with pytest.raises(RuntimeError, match="stop"):
            make().purify(model, make_data(8))
    finally:
        handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_frozen_normalisation_keeps_its_statistics() -> None:
    model = make_cnn()
    first, second = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][:2]
    first.requires_grad_(False)
    second.bias.requires_grad_(False)
    before = state(first), state(second)
    seen: list[bool] = []
    first.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.train()
    train(model, make_data(8), 1, sgd(model))
    assert seen == [False]
    assert first.training
    assert equal(state(first), before[0])
    assert not equal(state(second), before[1])
    plain = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False), nn.Linear(64, 10))
    train(plain, make_data(8), 1, sgd(plain))
    assert plain[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("sizes", "used"), [((4, 4, 1), [4, 4]), ((1,), [1]), ((1, 1, 1), [1, 1, 1]), ((4, 2), [4, 2])]
)
def test_a_last_batch_of_one_image_is_left_out(sizes: tuple[int, ...], used: list[int]) -> None:
    assert [len(images) for images, _ in training_batches(make_data(*sizes), 0)] == used


@pytest.mark.parametrize(
    "make", [lambda: FineTuning([0.01], max_epochs=1), lambda: AdversarialNeuronPruning(iterations=4)]
)
def test_maps_of_one_position_and_a_last_batch_of_one_image(make: Callable[[], Defense]) -> None:
    model = backbones.resnet18(10, in_channels=1, width=4).eval()
    assert make().purify(model, make_data(16, 1)).epochs > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: FinePruning(epochs=0),
        lambda: BatchNormPruning(u=1.0),
        lambda: EntropyPruning(u=1.0),
        lambda: ImplicitBackdoorAdversarialUnlearning(rounds=1),
    ],
    ids=["fine_pruning", "bnp", "ep", "ibau"],
)
def test_a_compiled_network_that_has_run_is_defended_like_a_plain_one(make: Callable[[], Defense]) -> None:
    torch._dynamo.reset()
    plain, compiled = make_cnn(), make_cnn()
    # Compiled within a module, as a LightningModule holds its network.
    outer = nn.Sequential(cast(nn.Module, torch.compile(compiled, backend="aot_eager")))
    with torch.no_grad():
        outer(make_batches(16)[0][0])
    assert make().purify(outer, make_data(16, 16)).note == make().purify(plain, make_data(16, 16)).note
    assert equal(state(plain), state(compiled))
