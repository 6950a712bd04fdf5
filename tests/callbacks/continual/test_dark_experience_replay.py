"""Dark experience replay through a Trainer against a loop written by hand; the module knows nothing of it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.continual.dark_experience_replay import DarkExperienceReplay
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


ALPHA, BETA = 0.6, 0.3


def make_callback(
    alpha: float = ALPHA, beta: float = BETA, dataloader: Iterable[Any] | None = OLD_TASK, insert_current: bool = False
) -> DarkExperienceReplay:
    return DarkExperienceReplay(alpha, beta, CAPACITY, BATCH_SIZE, dataloader, insert_current=insert_current)


def loop_by_hand(
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rho: float = 0.0,
    insert_current: bool = False,
    alpha: float = ALPHA,
    beta: float = BETA,
) -> nn.Module:
    """Two epochs of plain PyTorch on the new batch and one of the buffer."""
    net, buffer = make_net(), ReplayBuffer(CAPACITY)

    def autocast() -> AbstractContextManager[object]:
        # As Lightning's: copies of the weights that both batches share would sum their gradients in half precision.
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False)

    def insert(images: Tensor, labels: Tensor) -> None:
        net.eval()
        with torch.no_grad(), autocast():
            logits = net(images)
        net.train()
        buffer.insert(images, labels, logits)

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
                logits: Tensor = net(drawn.images)
                assert drawn.logits is not None
                distances = (logits.float() - drawn.logits) ** 2
                term = alpha * distances.mean() + beta * F.cross_entropy(logits, drawn.labels)
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
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int) -> None:
    """With the large scale the first steps overflow and are skipped; with 2^10 none is."""
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    make_trainer(make_callback(), scaler=scaler, accumulate=2).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(2, dtype=torch.float16, scaler=by_hand))
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


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
def test_current_samples_may_be_offered_with_the_logits_after_their_step(
    precision: Literal["bf16-mixed"] | None,
) -> None:
    module, callback = Module(), make_callback(insert_current=True)
    make_trainer(callback, precision=precision).fit(module, make_loader())
    dtype = None if precision is None else torch.bfloat16
    assert_equal_states(module.net, loop_by_hand(dtype=dtype, insert_current=True))
    assert distance(module.net, loop_by_hand(dtype=dtype)) > 1e-3


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_logits_are_those_of_the_model_that_comes_in() -> None:
    """In evaluation mode, also where the fit has put some layers there; all are back in their modes afterwards."""

    class KeepsDropoutOff(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net[3].eval()  # type: ignore[index]

    class SeesModes(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.modes = [part.training for part in pl_module.modules()]

    module, callback, sees = KeepsDropoutOff(), DarkExperienceReplay(dataloader=OLD_TASK), SeesModes()
    expected = [part.training for part in module.modules()]
    make_trainer(callback, sees, epochs=1).fit(module, make_loader())
    assert sees.modes == expected
    state = callback.state_dict()["buffer"]
    assert len(state["labels"]) == 40
    assert state["logits"].dtype == torch.float32
    before = make_net().eval()
    for (images, labels), start in zip(OLD_TASK, range(0, 40, 8), strict=True):
        assert torch.equal(state["labels"][start : start + 8], labels)
        torch.testing.assert_close(state["logits"][start : start + 8], before(images))


@pytest.mark.parametrize(("alpha", "beta"), [(ALPHA, 0.0), (0.0, BETA)])
def test_either_term_alone(alpha: float, beta: float) -> None:
    """DER has no labels; without the logits it is experience replay, bit for bit."""
    module = Module()
    make_trainer(make_callback(alpha, beta)).fit(module, make_loader())
    assert_equal_states(module.net, loop_by_hand(alpha=alpha, beta=beta))
    if alpha == 0:
        other = Module()
        make_trainer(ExperienceReplay(beta, CAPACITY, BATCH_SIZE, OLD_TASK)).fit(other, make_loader())
        assert distance(module, other) == 0


def test_zero_factors_are_the_plain_run() -> None:
    module, plain, callback = Module(), Module(), make_callback(0, 0, insert_current=True)
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    make_trainer().fit(plain, make_loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert not trainer.callback_metrics
    assert callback.state_dict()["buffer"]["seen"] == 0


def test_random_streams_and_modes_are_the_plain_run() -> None:
    class Unseeded(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.Identity()  # type: ignore[operator]

        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            """Draw the masks from the global state."""

    runs = []
    for callbacks in ([], [make_callback(1e-30, 1e-30, insert_current=True)]):
        module = Unseeded()
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, make_loader())
        runs.append((flat(module.parameters()), torch.get_rng_state()))
        assert not module._forward_hooks
        assert all(part.training for part in module.modules())
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_modes_are_put_back_after_an_exception() -> None:
    class Fails(Module):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("broken")

    module = Fails()
    with pytest.raises(OSError, match="broken"):
        make_trainer(make_callback()).fit(module, make_loader())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("insert_current", [False, True])
def test_resume_goes_on_with_the_buffer(tmp_path: Path, insert_current: bool) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    callback = make_callback(insert_current=insert_current)
    again = make_callback(dataloader=None, insert_current=insert_current)  # filling again would fail
    make_trainer(callback, SavesFirstEpoch(path)).fit(whole, make_loader())
    make_trainer(again).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal_states(resumed.net, whole.net, atol=0)
    states = callback.state_dict()["buffer"], again.state_dict()["buffer"]
    assert torch.equal(states[0]["logits"], states[1]["logits"])


def test_penalty_is_logged_under_its_name() -> None:
    trainer = make_trainer(make_callback(), epochs=1)
    trainer.fit(Module(), make_loader())
    assert set(trainer.callback_metrics) == {"dark_experience_replay/penalty", "dark_experience_replay/share"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, r"`alpha` to be a non-negative float, but got -1\.0"),
        ({"beta": float("nan")}, "`beta` to be a non-negative float, but got nan"),
        ({"capacity": 0}, "`capacity` to be a positive integer, but got 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DarkExperienceReplay(**arguments)
