"""Experience replay through a Trainer against a loop written by hand; the module knows nothing of it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay
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


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


OLD_TASK = make_batches(seed=2)


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


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


def assert_equal_states(actual: nn.Module, expected: nn.Module, atol: float = 2e-6) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def distance(first: nn.Module, second: nn.Module) -> float:
    return float((flat(first.parameters()) - flat(second.parameters())).abs().max())


class SavesFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


STRENGTH = 0.7


def make_callback(
    strength: float = STRENGTH, dataloader: Iterable[Any] | None = OLD_TASK, insert_current: bool = False, seed: int = 0
) -> ExperienceReplay:
    return ExperienceReplay(strength, CAPACITY, BATCH_SIZE, dataloader, insert_current=insert_current, seed=seed)


def loop_by_hand(
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rho: float = 0.0,
    insert_current: bool = False,
) -> nn.Module:
    """Two epochs of plain PyTorch on the new batch and one of the buffer."""
    net, buffer = make_net(), ReplayBuffer(CAPACITY)

    def autocast() -> AbstractContextManager[object]:
        # As Lightning's: copies of the weights that both batches share would sum their gradients in half precision.
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False)

    def insert(images: Tensor, labels: Tensor) -> None:
        buffer.insert(images, labels)

    for batch in OLD_TASK:
        insert(*batch)
    parameters = list(net.parameters())
    opt = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches = list(enumerate(make_batches()))
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]

    def backward(step: int, window: list[tuple[int, Batch]], insert_after: bool) -> None:
        opt.zero_grad()
        for position, (index, (images, labels)) in enumerate(window):
            torch.manual_seed(100 + index)
            drawn = buffer.sample(BATCH_SIZE, keyed_generator(0, "experience_replay", step, position, 0))
            with autocast():
                loss = F.cross_entropy(net(images), labels)
                term = STRENGTH * F.cross_entropy(net(drawn.images), drawn.labels)
            # Lightning divides by `accumulate` in a shorter last window too.
            scaler.scale((loss + term) / accumulate).backward()  # type: ignore[no-untyped-call]
            if insert_after and position < len(window) - 1:
                insert(images, labels)

    for step, window in enumerate(windows * 2):
        backward(step, window, insert_current)
        if rho:
            weights, gradient = flat(parameters), flat(p.grad for p in parameters)
            buffers = [b.clone() for b in net.buffers()]
            nn.utils.vector_to_parameters(weights + rho * gradient / gradient.norm(), parameters)
            backward(step, window, False)
            nn.utils.vector_to_parameters(weights, parameters)
            for now, before in zip(net.buffers(), buffers, strict=True):
                now.copy_(before)
        scaler.unscale_(opt)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(opt)
        scaler.update()
        if insert_current:
            insert(*window[-1][1])
    return net


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_loop_by_hand(accumulate: int, clip: float | None) -> None:
    """Running statistics of BatchNorm included, which follow the samples of the buffer too."""
    module, plain = Module(), Module()
    make_trainer(make_callback(), accumulate=accumulate, clip=clip).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, clip))
    make_trainer(accumulate=accumulate, clip=clip).fit(plain, make_loader())
    assert distance(module.net, plain.net) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16(accumulate: int) -> None:
    module = Module()
    make_trainer(make_callback(), precision="bf16-mixed", accumulate=accumulate, clip=1.0).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, 1.0, torch.bfloat16))


@pytest.mark.parametrize("exponent", [10, 40])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int, accumulate: int) -> None:
    """With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    make_trainer(make_callback(), scaler=scaler, accumulate=accumulate).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, dtype=torch.float16, scaler=by_hand))
    assert scaler.get_scale() == by_hand.get_scale()
    assert (scaler.get_scale() < 2.0**exponent) == (exponent > 10)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sam_first", [True, False])
def test_both_passes_of_sam_draw_the_same_samples(accumulate: int, sam_first: bool) -> None:
    module = Module()
    callbacks: list[Callback] = [SharpnessAwareMinimization(rho=0.2), make_callback()]
    make_trainer(*callbacks[:: 1 if sam_first else -1], accumulate=accumulate).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, rho=0.2))
    assert distance(module.net, loop_by_hand(accumulate)) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_current_samples_may_be_offered_after_their_batch(accumulate: int) -> None:
    module, callback = Module(), make_callback(insert_current=True)
    callbacks = [callback, SharpnessAwareMinimization(rho=0.2)]
    make_trainer(*callbacks, accumulate=accumulate).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(accumulate, rho=0.2, insert_current=True))
    assert callback.state_dict()["buffer"]["seen"] == 40 + 80
    assert distance(module.net, loop_by_hand(accumulate, rho=0.2)) > 1e-3


def test_default_holds_the_previous_task_alone() -> None:
    callback, buffer = make_callback(), ReplayBuffer(CAPACITY)
    make_trainer(callback).fit(Module(), make_loader())
    for batch in OLD_TASK:
        buffer.insert(*batch)
    state, expected = callback.state_dict()["buffer"], buffer.state_dict()
    assert state["seen"] == 40
    assert torch.equal(state["images"], expected["images"])
    assert torch.equal(state["labels"], expected["labels"])


@pytest.mark.parametrize("insert_current", [False, True])
def test_zero_strength_is_the_plain_run(insert_current: bool) -> None:
    module, plain, callback = Module(), Module(), make_callback(strength=0, insert_current=insert_current)
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    make_trainer().fit(plain, make_loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert not trainer.callback_metrics
    assert callback.state_dict()["buffer"]["seen"] == 0


def test_random_streams_flags_and_modes_are_the_plain_run() -> None:
    """A strength that changes no weight leaves the plain run; a module without BatchNorm cannot tell."""

    class Unseeded(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.Identity()  # type: ignore[operator]

        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            """Draw the masks from the global state."""

    shuffled = DataLoader(make_loader().dataset, batch_size=8, shuffle=True)
    runs = []
    for callbacks in ([], [make_callback(strength=1e-30, dataloader=shuffled, insert_current=True)]):
        module = Unseeded()
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, make_loader())
        runs.append((flat(module.parameters()), torch.get_rng_state()))
        assert not module._forward_hooks
        assert all(part.training for part in module.modules())
        assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


class Old(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[torch.device, bool]] = []

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return make_loader()

    def reference_batches(self, device: torch.device, clean: bool = False) -> Iterable[tuple[Tensor, Tensor, str]]:
        self.asked.append((device, clean))
        for images, labels in OLD_TASK:
            yield images, labels, "what else a batch may hold"


def test_datamodule_replays_the_previous_task() -> None:
    data, module = Old(), Module()
    make_trainer(make_callback(dataloader=None)).fit(module, datamodule=data)
    assert_equal_states(module.net, loop_by_hand())
    make_trainer(ExperienceReplay(reference="clean"), epochs=1).fit(Module(), datamodule=data)
    assert data.asked == [(torch.device("cpu"), False), (torch.device("cpu"), True)]


@pytest.mark.parametrize("insert_current", [False, True])
def test_resume_goes_on_with_the_buffer(tmp_path: Path, insert_current: bool) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    callback = make_callback(insert_current=insert_current)
    again = make_callback(dataloader=None, insert_current=insert_current)  # filling again would fail
    make_trainer(callback, SavesFirstEpoch(path), accumulate=2).fit(whole, make_loader())
    make_trainer(again, accumulate=2).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal_states(resumed.net, whole.net, atol=0)
    states = callback.state_dict()["buffer"], again.state_dict()["buffer"]
    assert states[0]["seen"] == states[1]["seen"]
    assert torch.equal(states[0]["images"], states[1]["images"])


def test_second_fit_fills_anew() -> None:
    callback = make_callback()
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


def test_half_precision_weights() -> None:
    module = Module()
    trainer = Trainer(
        callbacks=[make_callback(insert_current=True)], max_epochs=1, accelerator="cpu", logger=False,
        plugins=[HalfPrecision("bf16-true")], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, make_loader())
    assert next(module.parameters()).dtype == torch.bfloat16
    assert trainer.callback_metrics["experience_replay/penalty"] > 0


def test_penalty_and_share_are_logged() -> None:
    """A buffer that is drawn whole, and weights that stand still."""

    class Still(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = ExperienceReplay(STRENGTH, dataloader=OLD_TASK)
    trainer = make_trainer(callback, epochs=1)
    module = Still()
    module.net[3].p = 0.0  # type: ignore[index]
    trainer.fit(module, make_loader())
    state = callback.state_dict()["buffer"]
    penalty = STRENGTH * F.cross_entropy(module(state["images"] / 255), state["labels"]).detach()
    images, labels = make_batches()[-1]
    share = penalty / (penalty + F.cross_entropy(module(images), labels).detach())
    torch.testing.assert_close(trainer.callback_metrics["experience_replay/penalty"], penalty)
    torch.testing.assert_close(trainer.callback_metrics["experience_replay/share"], share)


def test_unsuitable_fits_are_refused() -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="`ExperienceReplay` got no sample of the previous task"):
        make_trainer(make_callback(dataloader=[])).fit(Module(), make_loader())
    with pytest.raises(MisconfigurationException, match=r"`ExperienceReplay` .* Pass `dataloader=...`"):
        make_trainer(make_callback(dataloader=None)).fit(Module(), make_loader())
    with pytest.raises(MisconfigurationException, match="`ExperienceReplay` needs automatic optimization"):
        make_trainer(make_callback()).fit(Manual(), make_loader())
    with pytest.raises(ValueError, match=r"in \[0, 1\], but .* normalisation out of the data and into the model"):
        make_trainer(make_callback(dataloader=[(torch.randn(8, 1, 6, 6), torch.zeros(8).long())])).fit(
            Module(), make_loader()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, r"`strength` to be a non-negative float, but got -1\.0"),
        ({"capacity": 0}, "`capacity` to be a positive integer, but got 0"),
        ({"batch_size": -1}, "`batch_size` to be a positive integer, but got -1"),
        ({"reference": "dirty"}, r"`reference` to be one of \('as_trained', 'clean'\), but got 'dirty'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExperienceReplay(**arguments)
