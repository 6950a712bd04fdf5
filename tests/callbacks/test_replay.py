"""What cannot be replayed is refused before the fit, through the callback that replays."""

from collections.abc import Iterator

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.callbacks.replay import StepReplay, check_replayable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


def make_trainer(*callbacks: Callback) -> Trainer:
    return Trainer(
        callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=2,
        enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2, limit_val_batches=0,
        log_every_n_steps=1,
    )  # fmt: skip


class Manual(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class ManualFromSetupOn(BoringModel):
    def setup(self, stage: str) -> None:
        self.automatic_optimization = False


class DrawsItself(BoringModel):
    def training_step(self, dataloader_iter: Iterator[object]) -> Tensor:  # type: ignore[override]
        return torch.zeros(())


class SecondOrder(BoringModel):
    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "needs automatic optimization, but `Manual` sets `automatic_optimization = False`. Remove that line"),
        (ManualFromSetupOn, "needs automatic optimization"),
        (DrawsItself, r"`training_step\(dataloader_iter\)` draws it itself. Use `training_step\(batch, batch_idx\)`"),
        (SecondOrder, "cannot be used with LBFGS.* Use another optimizer"),
    ],
)
def test_modules_that_cannot_be_replayed(module: type[LightningModule], message: str) -> None:
    trainer = make_trainer(SharpnessAwareMinimization())
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module())
    assert trainer.global_step == 0


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, XLAStrategy, SingleDeviceXLAStrategy])
def test_strategies_that_split_or_compile_the_step(strategy: type[Strategy]) -> None:
    trainer = make_trainer()
    # Built without __init__, which needs packages and devices that are not at hand.
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(
        MisconfigurationException, match=f'does not support `{strategy.__name__}`. Use .*strategy="ddp"'
    ):
        check_replayable(trainer, BoringModel(), "Sharpness")


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy()])
def test_strategies_that_are_supported(strategy: Strategy) -> None:
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = strategy
    check_replayable(trainer, BoringModel(), "Sharpness")


def test_two_callbacks_are_refused() -> None:
    trainer = make_trainer(SharpnessAwareMinimization(), SharpnessAwareMinimization(variant="asam"))
    with pytest.raises(
        MisconfigurationException, match=r"one `SharpnessAwareMinimization` callback.* Remove all but one"
    ):
        trainer.fit(BoringModel())


def test_other_stages_are_not_refused() -> None:
    trainer = make_trainer(SharpnessAwareMinimization())
    trainer.test(Manual(), verbose=False)


class TellsTheWorldIsLarger(Callback):
    """Pretend to run distributed, where None would leave the other processes waiting."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        trainer.strategy.world_size = 2  # type: ignore[attr-defined]


def test_no_loss_in_a_distributed_replay() -> None:
    class Fragile(BoringModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
            return None if callback.second_pass else super().training_step(batch, batch_idx)

    callback = SharpnessAwareMinimization()
    with pytest.raises(RuntimeError, match="returned None for a batch that it had given a loss before"):
        make_trainer(callback, TellsTheWorldIsLarger()).fit(Fragile())


def test_a_replaced_method_of_the_strategy_is_put_back() -> None:
    """Another callback may have stepped in before: its method is called, and left in place."""
    trainer = make_trainer()
    trainer.strategy.connect(BoringModel())
    calls: list[int] = []

    def training_step(*args: object, **kwargs: object) -> None:
        calls.append(1)

    trainer.strategy.training_step = training_step  # type: ignore[method-assign]
    replay = StepReplay(trainer, BoringModel(), is_due=lambda: True, finish=lambda optimizer, recorded: None)
    trainer.strategy.training_step(0, 0)
    assert calls == [1]
    replay.remove()
    replay.remove()
    assert trainer.strategy.training_step is training_step
    assert "optimizer_step" not in vars(trainer.strategy)
