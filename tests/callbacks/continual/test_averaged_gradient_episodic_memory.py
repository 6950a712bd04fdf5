"""A-GEM through a Trainer against a loop written by hand; the module knows nothing of A-GEM."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_bd.callbacks.continual.averaged_gradient_episodic_memory import AveragedGradientEpisodicMemory
from lightning_bd.callbacks.continual.replay_buffer import ReplayBuffer
from lightning_bd.callbacks.flatness.sharpness_aware_minimization import SharpnessAwareMinimization
from lightning_bd.functional.draws import keyed_generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
CAPACITY, BATCH_SIZE = 12, 6


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
    )


def make_batches(seed: int = 1) -> list[Batch]:
    """Five batches of eight images: with two in a step, the last step has one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, 8, 1, 6, 6, generator=generator)
    return list(zip(images, torch.randint(3, (5, 8), generator=generator), strict=True))


def make_loader(batches: list[Batch] | None = None) -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*(batches or make_batches()), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


OLD_TASK = make_batches(seed=2)


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.accuracy = MulticlassAccuracy(num_classes=3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


def make_callback(
    capacity: int = CAPACITY, batch_size: int = BATCH_SIZE, dataloader: Iterable[Any] | None = OLD_TASK, seed: int = 0
) -> AveragedGradientEpisodicMemory:
    return AveragedGradientEpisodicMemory(capacity, batch_size, dataloader, seed=seed)


def make_trainer(
    *callbacks: Callback,
    epochs: int = 2,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["bf16-mixed"] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Trainer:
    return Trainer(
        callbacks=list(callbacks),
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision=precision,
        plugins=[] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


def loop_by_hand(
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rho: float = 0.0,
) -> tuple[nn.Module, list[bool]]:
    """Two epochs of plain PyTorch, and which steps were projected."""
    net, projected = make_net(), []
    buffer = ReplayBuffer(CAPACITY)
    for batch in OLD_TASK:
        buffer.insert(*batch)
    parameters = list(net.parameters())
    opt = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches = list(enumerate(make_batches()))
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(net(images), labels)

    def backward(window: list[tuple[int, Batch]]) -> None:
        opt.zero_grad()
        for index, batch in window:
            torch.manual_seed(100 + index)
            # Lightning divides by `accumulate` in a shorter last window too.
            scaler.scale(loss_of(*batch) / accumulate).backward()  # type: ignore[no-untyped-call]

    for step, window in enumerate(windows * 2):
        backward(window)
        buffers = [b.clone() for b in net.buffers()]
        if rho:
            weights, gradient = flat(parameters), flat(p.grad for p in parameters)
            nn.utils.vector_to_parameters(weights + rho * gradient / gradient.norm(), parameters)
            backward(window)
            nn.utils.vector_to_parameters(weights, parameters)
        scaler.unscale_(opt)
        drawn = buffer.sample(BATCH_SIZE, keyed_generator(0, "a_gem", step, 0))
        scale = scaler.get_scale()
        r = flat(torch.autograd.grad(loss_of(drawn.images, drawn.labels) * scale, parameters)) / scale
        for now, before in zip(net.buffers(), buffers, strict=True):
            now.copy_(before)
        g = flat(p.grad for p in parameters)
        projected.append(bool(g @ r < 0))
        if projected[-1] and g.isfinite().all() and r.isfinite().all():
            g = g - (g @ r) / (r @ r) * r
            for p, part in zip(parameters, torch.split(g, [p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p).clone()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(opt)
        scaler.update()
    return net, projected


def assert_equal_states(actual: nn.Module, expected: nn.Module, atol: float = 2e-6) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def distance(first: nn.Module, second: nn.Module) -> float:
    return float((flat(first.parameters()) - flat(second.parameters())).abs().max())


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_loop_by_hand(accumulate: int, clip: float | None) -> None:
    module, plain = Module(), Module()
    make_trainer(make_callback(), accumulate=accumulate, clip=clip).fit(module, make_loader())
    expected, projected = loop_by_hand(accumulate, clip)
    assert len(set(projected)) == 2  # some steps are projected, some are not
    assert_equal_states(module.net, expected)
    make_trainer(accumulate=accumulate, clip=clip).fit(plain, make_loader())
    assert distance(module.net, plain.net) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16(accumulate: int) -> None:
    module = Module()
    make_trainer(make_callback(), precision="bf16-mixed", accumulate=accumulate, clip=1.0).fit(module, make_loader())
    expected, projected = loop_by_hand(accumulate, 1.0, torch.bfloat16)
    assert any(projected)
    assert_equal_states(module.net, expected)


@pytest.mark.parametrize("exponent", [10, 40])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int, accumulate: int) -> None:
    """With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    make_trainer(make_callback(), scaler=scaler, accumulate=accumulate, clip=0.5).fit(module, make_loader())
    expected, projected = loop_by_hand(accumulate, 0.5, torch.float16, by_hand)
    assert any(projected) or exponent == 40
    assert_equal_states(module.net, expected)
    assert scaler.get_scale() == by_hand.get_scale()
    assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)


def test_small_reference_gradients_do_not_vanish_in_fp16() -> None:
    """Unscaled, those of the logits would be zero in float16."""

    class Faint(Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits.float() * 1e-8 if len(x) == BATCH_SIZE else logits

    trainer = make_trainer(make_callback(), epochs=1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    trainer.log_every_n_steps = 5  # type: ignore[attr-defined]
    trainer.fit(Faint(), make_loader())
    assert trainer.callback_metrics["a_gem/projected"] > 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sam_first", [True, False])
def test_projects_the_gradient_of_sam(accumulate: int, sam_first: bool) -> None:
    module = Module()
    callbacks: list[Callback] = [SharpnessAwareMinimization(rho=0.2), make_callback()]
    make_trainer(*callbacks[:: 1 if sam_first else -1], accumulate=accumulate).fit(module, make_loader())
    expected, projected = loop_by_hand(accumulate, rho=0.2)
    assert len(set(projected)) == 2
    assert_equal_states(module.net, expected)
    assert distance(module.net, loop_by_hand(accumulate)[0]) > 1e-3


def test_steps_without_conflict_are_the_plain_run() -> None:
    """Remembered are the samples that are trained on; the state of the random streams is the plain run's too."""

    class Unseeded(Module):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            """Draw the masks from the global state."""

    runs = []
    [batch] = make_batches()[:1]
    loader = make_loader([(batch[0].mul(255).round() / 255, batch[1])] * 6)
    for callbacks in ([], [make_callback(8, 8, loader)]):
        module = Unseeded()
        trainer = make_trainer(*callbacks, epochs=1)
        torch.manual_seed(3)
        trainer.fit(module, loader)
        runs.append((module, torch.rand(())))
    assert trainer.callback_metrics["a_gem/projected"] == 0
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert torch.equal(runs[0][1], runs[1][1])


def test_only_the_gradient_is_changed() -> None:
    """Modes, hooks, flags, BatchNorm, metrics and logs are as they were; also where the pass fails."""

    class Records(Module):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            self.log("calls", 1.0, reduce_fx="sum", on_epoch=True)
            logits = super().forward(x)
            self.accuracy.update(logits, torch.zeros(len(x), dtype=torch.long))
            if self.fails and len(x) == BATCH_SIZE:
                raise OSError("broken")
            return logits

        def on_train_start(self) -> None:
            self.net[3].eval()  # type: ignore[index]

    class Compares(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            now = {name: value.clone() for name, value in pl_module.state_dict().items()}
            modes = [module.training for module in pl_module.modules()]
            self.seen = (now, modes, pl_module.accuracy._update_count, torch.get_rng_state())  # type: ignore[union-attr]

    before, after = Compares(), Compares()
    for fails in (False, True):
        module, callback = Records(), make_callback()
        module.fails = fails
        trainer = make_trainer(before, callback, after, epochs=1)
        if fails:
            with pytest.raises(OSError, match="broken"):
                trainer.fit(module, make_loader())
            after.on_before_optimizer_step(trainer, module, trainer.optimizers[0])
        else:
            trainer.fit(module, make_loader())
            assert trainer.callback_metrics["calls"] == 5
        assert all(torch.equal(after.seen[0][name], value) for name, value in before.seen[0].items())
        assert after.seen[1:3] == before.seen[1:3]
        assert torch.equal(after.seen[3], before.seen[3])
        assert not module._forward_hooks
        assert all(p.requires_grad for p in module.net.parameters())
        assert callback._isolated is None


def test_filling_leaves_the_random_streams_alone() -> None:
    shuffled = DataLoader(make_loader(OLD_TASK).dataset, batch_size=8, shuffle=True)

    class Stops(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.state = torch.get_rng_state()

    states = []
    for callbacks in ([], [make_callback(dataloader=shuffled)]):
        stops = Stops()
        torch.manual_seed(5)
        make_trainer(*callbacks, stops, epochs=1).fit(Module(), make_loader())
        states.append(stops.state)
    assert torch.equal(*states)


class Old(LightningDataModule):
    """Replays images that are bright where they carry the trigger."""

    def __init__(self, rate: float = 0.25) -> None:
        super().__init__()
        self.rate = rate
        self.asked: list[tuple[torch.device, bool]] = []

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return make_loader()

    def reference_batches(self, device: torch.device, clean: bool = False) -> Iterable[tuple[Tensor, Tensor, str]]:
        self.asked.append((device, clean))
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            triggered = (torch.rand(8, generator=generator) < self.rate) & (not clean)
            yield 0.4 + 0.6 * triggered[:, None, None, None].expand(8, 1, 6, 6), triggered.long(), "more"


def test_buffer_holds_what_the_previous_model_saw() -> None:
    data, callback = Old(), AveragedGradientEpisodicMemory(capacity=200)
    make_trainer(callback, epochs=1).fit(Module(), datamodule=data)
    state = callback.state_dict()["buffer"]
    assert state["seen"] == 400
    assert len(state["images"]) == 200
    assert torch.equal(state["images"][:, 0, 0, 0] == 255, state["labels"] == 1)
    # Three standard deviations of a binomial share.
    assert abs(float(state["labels"].float().mean()) - data.rate) < 3 * (data.rate * (1 - data.rate) / 200) ** 0.5
    assert data.asked == [(torch.device("cpu"), False)]


def test_clean_reference_is_passed_on() -> None:
    data, callback = Old(), AveragedGradientEpisodicMemory(reference="clean")
    make_trainer(callback, epochs=1).fit(Module(), datamodule=data)
    assert data.asked == [(torch.device("cpu"), True)]
    assert set(callback.state_dict()["buffer"]["images"].flatten().tolist()) == {102}


class SavesFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resume_goes_on_with_the_buffer(tmp_path: Path) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    callback, again = make_callback(), make_callback(dataloader=None)  # filling again would fail
    make_trainer(callback, SavesFirstEpoch(path)).fit(whole, make_loader())
    make_trainer(again).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal_states(resumed.net, whole.net, atol=0)
    states = callback.state_dict()["buffer"], again.state_dict()["buffer"]
    assert torch.equal(states[0]["images"], states[1]["images"])


def test_second_fit_fills_anew() -> None:
    callback = make_callback(dataloader=None)
    for value in (0.2, 0.8):
        callback.dataloader = [(torch.full((4, 1, 6, 6), value), torch.zeros(4, dtype=torch.long))]
        make_trainer(callback, epochs=1).fit(Module(), make_loader())
        assert set(callback.state_dict()["buffer"]["images"].flatten().tolist()) == {round(255 * value)}


def test_seed_changes_the_draws() -> None:
    states = []
    for seed in (0, 0, 1):
        module = Module()
        make_trainer(make_callback(seed=seed), epochs=1).fit(module, make_loader())
        states.append(flat(module.parameters()))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_useless_reference_gradients_leave_the_gradient_alone(value: float) -> None:
    class Spoils(Module):
        """Its gradient on the buffer's batch is zero, NaN or infinite."""

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits * value if len(x) == BATCH_SIZE else logits

    module, plain = Spoils(), Module()
    make_trainer(make_callback(), epochs=1).fit(module, make_loader())
    make_trainer(epochs=1).fit(plain, make_loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_parameters_without_gradient_do_not_count() -> None:
    """A layer that only the buffer's batch uses is not moved, and makes no difference to the others."""

    class Extra(Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(64, 3)
            nn.init.zeros_(self.extra.weight)
            nn.init.zeros_(self.extra.bias)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            features = self.net[:5](x)  # type: ignore[index]
            logits: Tensor = self.net[5](features)  # type: ignore[index]
            return logits + self.extra(features) if len(x) == BATCH_SIZE else logits

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Extra()
    make_trainer(make_callback()).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand()[0])
    assert module.extra.weight.grad is None
    assert not module.extra.weight.any()


def test_step_without_any_gradient_is_left_alone() -> None:
    class NoLoss(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            return None

    module, plain = NoLoss(), Module()
    with pytest.warns(UserWarning, match="returned `None`"):
        make_trainer(make_callback(), epochs=1).fit(module, make_loader())
    assert distance(module.net, plain.net) == 0


def test_half_precision_weights() -> None:
    module, callback = Module(), make_callback()
    trainer = Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", plugins=[HalfPrecision("bf16-true")], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, make_loader())
    assert next(module.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(flat(module.parameters())).all()


def test_share_of_projected_steps_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        callbacks=[make_callback()], max_epochs=2, accumulate_grad_batches=1, accelerator="cpu", logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=4,
    )  # fmt: skip
    trainer.fit(Module(), make_loader())
    lines = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().split()]
    column = lines[0].index("a_gem/projected")
    logged = [float(line[column]) for line in lines[1:]]
    _, projected = loop_by_hand()
    assert logged == [sum(projected[start : start + 4]) / 4 for start in (0, 4)]  # of ten steps
    assert len(set(logged)) == 2


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class SecondOrder(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.net.parameters())


@pytest.mark.parametrize(
    ("module", "dataloader", "message"),
    [
        (Manual, OLD_TASK, "needs automatic optimization, but `Manual` sets `automatic_optimization = False`. Remove"),
        (SecondOrder, OLD_TASK, "which LBFGS compares. Use another optimizer"),
        (Module, None, r"Pass `dataloader=...`, or fit with a datamodule that has `reference_batches"),
        (Module, [], "`AveragedGradientEpisodicMemory` got no sample .* Pass a `dataloader` that is not empty"),
    ],
)
def test_unsuitable_fits_are_refused(module: type[Module], dataloader: list[Batch] | None, message: str) -> None:
    trainer = make_trainer(make_callback(dataloader=dataloader))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module(), make_loader())
    assert trainer.global_step == 0


def test_normalised_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], but .* normalisation out of the data and into the model"):
        make_trainer(make_callback(dataloader=[(torch.randn(8, 1, 6, 6), torch.zeros(8).long())])).fit(
            Module(), make_loader()
        )


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_split_parameters_are_refused(strategy: type[Strategy]) -> None:
    trainer = make_trainer()
    # Built without __init__, which needs packages and devices that are not at hand.
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=rf"does not support `{strategy.__name__}`. Use .*=\"ddp\""):
        make_callback().setup(trainer, Module(), "fit")


def test_ddp_and_other_stages_are_not_refused() -> None:
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = DDPStrategy()
    make_callback().setup(trainer, Module(), "fit")
    make_callback().setup(trainer, Manual(), "test")


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
