"""A-GEM through a Trainer against a loop written by hand; the module knows nothing of A-GEM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_bd.callbacks.continual.averaged_gradient_episodic_memory import AveragedGradientEpisodicMemory

if TYPE_CHECKING:
    from tests.callbacks.conftest import Batch, Lab
    from tests.callbacks.continual.conftest import GradientMemoryMethod

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


@pytest.mark.parametrize("values", [{}, {"accumulate": 2}, {"rho": 0.2}, {"rho": 0.2, "accumulate": 2}])
def test_some_steps_are_projected_and_some_are_not(
    lab: Lab, agem: GradientMemoryMethod, values: dict[str, Any]
) -> None:
    """In the loops by hand, which the callback is compared with; by half precision and clipping too."""
    assert len(set(agem.by_hand(lab.settings(**values)).notes)) == 2
    for half in ({"bf16": True, "clip": 1.0}, {"exponent": 10, "clip": 0.5}):
        assert any(agem.by_hand(lab.settings(**values, **half)).notes)


def test_small_reference_gradients_do_not_vanish_in_fp16(lab: Lab, agem: GradientMemoryMethod) -> None:
    """Unscaled, those of the logits would be zero in float16."""

    class Faint(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return logits.float() * 1e-8 if len(x) == agem.batch_size else logits

    trainer = lab.trainer(agem.callback(), settings=lab.settings(exponent=10), epochs=1, log_every=5)
    trainer.fit(agem.module(Faint), agem.loader())
    assert trainer.callback_metrics["a_gem/projected"] > 0


def test_steps_without_conflict_are_the_plain_run(lab: Lab, agem: GradientMemoryMethod) -> None:
    """Remembered are the samples that are trained on; the state of the random streams is the plain run's too."""

    class Unseeded(LightningModule):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            """Draw the masks from the global state."""

    runs = []
    [batch] = agem.batches()[:1]
    loader = lab.loader([(batch[0].mul(255).round() / 255, batch[1])] * 6)
    for callbacks in ([], [agem.callback(8, 8, loader)]):
        module = agem.module(Unseeded)
        trainer = lab.trainer(*callbacks, epochs=1)
        torch.manual_seed(3)
        trainer.fit(module, loader)
        runs.append((module, torch.rand(())))
    assert trainer.callback_metrics["a_gem/projected"] == 0
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert torch.equal(runs[0][1], runs[1][1])


def test_only_the_gradient_is_changed(lab: Lab, agem: GradientMemoryMethod) -> None:
    """Modes, hooks, flags, BatchNorm, metrics and logs are as they were; also where the pass fails."""

    class Records(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            self.log("calls", 1.0, reduce_fx="sum", on_epoch=True)
            logits: Tensor = super().forward(x)
            metric = self.get_submodule("accuracy")
            assert isinstance(metric, MulticlassAccuracy)
            metric.update(logits, torch.zeros(len(x), dtype=torch.long))
            if failing[-1] and len(x) == agem.batch_size:
                raise OSError("broken")
            return logits

        def on_train_start(self) -> None:
            self.get_submodule("net.3").eval()

    class Compares(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            now = {name: value.clone() for name, value in pl_module.state_dict().items()}
            modes = [module.training for module in pl_module.modules()]
            self.seen = (now, modes, pl_module.get_submodule("accuracy")._update_count, torch.get_rng_state())

    failing: list[bool] = []
    before, after = Compares(), Compares()
    for fails in (False, True):
        failing.append(fails)
        module, callback = agem.module(Records), agem.callback()
        module.accuracy = MulticlassAccuracy(num_classes=3)
        trainer = lab.trainer(before, callback, after, epochs=1)
        if fails:
            with pytest.raises(OSError, match="broken"):
                trainer.fit(module, agem.loader())
            after.on_before_optimizer_step(trainer, module, trainer.optimizers[0])
        else:
            trainer.fit(module, agem.loader())
            assert trainer.callback_metrics["calls"] == 5
        assert all(torch.equal(after.seen[0][name], value) for name, value in before.seen[0].items())
        assert after.seen[1:3] == before.seen[1:3]
        assert torch.equal(after.seen[3], before.seen[3])
        assert not module._forward_hooks
        assert all(p.requires_grad for p in module.net.parameters())
        assert callback._isolated is None


def test_filling_leaves_the_random_streams_alone(lab: Lab, agem: GradientMemoryMethod) -> None:
    shuffled = DataLoader(lab.loader(agem.old_task()).dataset, batch_size=8, shuffle=True)

    class Stops(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.state = torch.get_rng_state()

    states = []
    for callbacks in ([], [agem.callback(dataloader=shuffled)]):
        stops = Stops()
        torch.manual_seed(5)
        lab.trainer(*callbacks, stops, epochs=1).fit(agem.module(), agem.loader())
        states.append(stops.state)
    assert torch.equal(*states)


class Old(LightningDataModule):
    """Replays images that are bright where they carry the trigger."""

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]], rate: float = 0.25) -> None:
        super().__init__()
        self.loader, self.rate = loader, rate
        self.asked: list[tuple[torch.device, bool]] = []

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader

    def reference_batches(self, device: torch.device, clean: bool = False) -> Iterable[tuple[Tensor, Tensor, str]]:
        self.asked.append((device, clean))
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            triggered = (torch.rand(8, generator=generator) < self.rate) & (not clean)
            yield 0.4 + 0.6 * triggered[:, None, None, None].expand(8, 1, 6, 6), triggered.long(), "more"


def test_buffer_holds_what_the_previous_model_saw(lab: Lab, agem: GradientMemoryMethod) -> None:
    data, callback = Old(agem.loader()), AveragedGradientEpisodicMemory(capacity=200)
    lab.trainer(callback, epochs=1).fit(agem.module(), datamodule=data)
    state = callback.state_dict()["buffer"]
    assert state["seen"] == 400
    assert len(state["images"]) == 200
    assert torch.equal(state["images"][:, 0, 0, 0] == 255, state["labels"] == 1)
    # Three standard deviations of a binomial share.
    assert abs(float(state["labels"].float().mean()) - data.rate) < 3 * (data.rate * (1 - data.rate) / 200) ** 0.5
    assert data.asked == [(torch.device("cpu"), False)]


def test_clean_reference_is_passed_on(lab: Lab, agem: GradientMemoryMethod) -> None:
    data, callback = Old(agem.loader()), AveragedGradientEpisodicMemory(reference="clean")
    lab.trainer(callback, epochs=1).fit(agem.module(), datamodule=data)
    assert data.asked == [(torch.device("cpu"), True)]
    assert set(callback.state_dict()["buffer"]["images"].flatten().tolist()) == {102}


def test_second_fit_fills_anew(lab: Lab, agem: GradientMemoryMethod) -> None:
    callback = agem.callback(dataloader=None)
    for value in (0.2, 0.8):
        callback.dataloader = [(torch.full((4, 1, 6, 6), value), torch.zeros(4, dtype=torch.long))]
        lab.trainer(callback, epochs=1).fit(agem.module(), agem.loader())
        assert set(callback.state_dict()["buffer"]["images"].flatten().tolist()) == {round(255 * value)}


def test_seed_changes_the_draws(lab: Lab, agem: GradientMemoryMethod) -> None:
    states = []
    for seed in (0, 0, 1):
        module = agem.module()
        lab.trainer(agem.callback(seed=seed), epochs=1).fit(module, agem.loader())
        states.append(module)
    assert lab.distance(states[0], states[1]) == 0
    assert lab.distance(states[0], states[2]) > 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_useless_reference_gradients_leave_the_gradient_alone(
    lab: Lab, agem: GradientMemoryMethod, value: float
) -> None:
    class Spoils(LightningModule):
        """Its gradient on the buffer's batch is zero, NaN or infinite."""

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return logits * value if len(x) == agem.batch_size else logits

    module, plain = agem.module(Spoils), agem.module()
    lab.trainer(agem.callback(), epochs=1).fit(module, agem.loader())
    lab.trainer(epochs=1).fit(plain, agem.loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_parameters_without_gradient_do_not_count(lab: Lab, agem: GradientMemoryMethod) -> None:
    """A layer that only the buffer's batch uses is not moved, and makes no difference to the others."""

    class Extra(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            features = net[:5](x)
            logits: Tensor = net[5](features)
            return logits + extra(features) if len(x) == agem.batch_size else logits

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    net, extra = lab.net(), nn.Linear(64, 3)
    nn.init.zeros_(extra.weight)
    nn.init.zeros_(extra.bias)
    module = agem.module(Extra, net=net)
    module.extra = extra
    lab.trainer(agem.callback()).fit(module, agem.loader())
    lab.assert_equal_states(module.net, agem.by_hand().net)
    assert extra.weight.grad is None
    assert not extra.weight.any()


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # once a process
def test_step_without_any_gradient_is_left_alone(lab: Lab, agem: GradientMemoryMethod) -> None:
    class NoLoss(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return None

    module, plain = agem.module(NoLoss), agem.module()
    lab.trainer(agem.callback(), epochs=1).fit(module, agem.loader())
    assert lab.distance(module.net, plain.net) == 0


def test_half_precision_weights(lab: Lab, agem: GradientMemoryMethod) -> None:
    module, callback = agem.module(), agem.callback()
    trainer = lab.trainer(callback, epochs=1, plugins=[HalfPrecision("bf16-true")])
    trainer.fit(module, agem.loader())
    assert next(module.parameters()).dtype == torch.bfloat16
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_share_of_projected_steps_is_logged(lab: Lab, agem: GradientMemoryMethod, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = lab.trainer(agem.callback(), epochs=2, accumulate=1, logger=logger, log_every=4)
    trainer.fit(agem.module(), agem.loader())
    lines = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().split()]
    column = lines[0].index("a_gem/projected")
    logged = [float(line[column]) for line in lines[1:]]
    projected = agem.by_hand().notes
    assert logged == [sum(projected[start : start + 4]) / 4 for start in (0, 4)]  # of ten steps
    assert len(set(logged)) == 2


def test_a_resumed_fit_goes_on_counting(lab: Lab, agem: GradientMemoryMethod, tmp_path: Path) -> None:
    """The first epoch's five steps leave one that was not recorded."""
    shares = []
    for resumed in (False, True):
        extra = [] if resumed else [lab.saves_first_epoch(tmp_path / "first.ckpt")]
        logger = CSVLogger(tmp_path / str(resumed))
        trainer = lab.trainer(agem.callback(), *extra, epochs=2, accumulate=1, logger=logger, log_every=4)
        path = tmp_path / "first.ckpt" if resumed else None
        trainer.fit(agem.module(), agem.loader(), ckpt_path=path, weights_only=True)
        shares.append(float(trainer.callback_metrics["a_gem/projected"]))
    expected = sum(agem.by_hand().notes[4:8]) / 4
    assert shares == [expected, expected]


@pytest.mark.parametrize(
    ("dataloader", "message"),
    [
        (None, r"Pass `dataloader=...`, or fit with a datamodule that has `reference_batches"),
        ([], "`AveragedGradientEpisodicMemory` got no sample .* Pass a `dataloader` that is not empty"),
    ],
)
def test_unsuitable_data_is_refused(
    lab: Lab, agem: GradientMemoryMethod, dataloader: list[Batch] | None, message: str
) -> None:
    trainer = lab.trainer(agem.callback(dataloader=dataloader))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(agem.module(), agem.loader())
    assert trainer.global_step == 0


def test_normalised_images_are_refused(lab: Lab, agem: GradientMemoryMethod) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], but .* normalisation out of the data and into the model"):
        lab.trainer(agem.callback(dataloader=[(torch.randn(8, 1, 6, 6), torch.zeros(8).long())])).fit(
            agem.module(), agem.loader()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "`capacity` to be a positive integer, but got 0"),
        ({"batch_size": -1}, "`batch_size` to be a positive integer, but got -1"),
        ({"reference": "dirty"}, r"`reference` to be one of \('as_trained', 'clean'\), but got 'dirty'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AveragedGradientEpisodicMemory(**arguments)
