"""Small data and Trainers for the attacks that train their trigger."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_bd.backbones import small_cnn
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import InputAwareTrigger, LIRATrigger, Trigger


class Recorder(Callback):
    """Keeps the batches that were trained on, and the trigger's weights before each."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self.batches.append(batch)


class Cut(Callback):
    """Raises at the start of an epoch's second batch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            raise ConnectionAbortedError("cut")


class Lab:
    """Makes what the tests need."""

    recorder = Recorder
    cut = Cut

    def lira_trigger(self, strength: float = 0.3) -> LIRATrigger:
        """A LIRA trigger with few weights."""
        return LIRATrigger(strength, width=4, depth=1, seed=1)

    def input_aware_trigger(self) -> InputAwareTrigger:
        """An input-aware trigger with few weights."""
        return InputAwareTrigger(width=4, depth=1, seed=1)

    def data(self, trigger: Trigger, rate: float = 0.4, cover_rate: float = 0.0, **others: Any) -> DigitsDataModule:
        """96 digits of 8 pixels in three batches."""
        poison = Poison(trigger, rate=rate, target=0, cover_rate=cover_rate)
        return DigitsDataModule(poison, **{"subset": 96, "test_subset": 40, "batch_size": 32, "seed": 3, **others})

    def backbone(self) -> nn.Module:
        """A tiny network, always with the same weights."""
        torch.manual_seed(0)
        return small_cnn(10, 1, width=4)

    def trainer(self, epochs: int = 2, *callbacks: Callback, **others: Any) -> Trainer:
        """A quiet Trainer."""
        arguments: dict[str, Any] = {
            "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "max_epochs": epochs, "callbacks": list(callbacks), "limit_val_batches": 0,
            "log_every_n_steps": 1, **others,
        }  # fmt: skip
        return Trainer(**arguments)


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    """Put the global random state back."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def lab() -> Lab:
    """What the tests need."""
    return Lab()


def _same(one: nn.Module, other: nn.Module) -> bool:
    state, others = one.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)


@pytest.fixture
def same() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two modules have equal weights, bit for bit."""
    return _same
