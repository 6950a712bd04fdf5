"""Memory aware synapses through a Trainer against loops written by hand; the module knows nothing of them."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.continual.memory_aware_synapses import MemoryAwareSynapses
from lightning_bd.callbacks.continual.reference import ReferenceKind
from lightning_bd.callbacks.flatness import SharpnessAwareMinimization

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]
STRENGTH = 4.0


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def make_batches(seed: int = 1) -> list[Batch]:
    """Five batches of eight images: with two in a step, the last step has one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, 8, 1, 6, 6, generator=generator)
    return list(zip(images, torch.randint(3, (5, 8), generator=generator), strict=True))


OLD_TASK = make_batches(seed=2)


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


class Module(LightningModule):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


def make_callback(
    strength: float = STRENGTH,
    num_samples: int | None = None,
    dataloader: Iterable[object] | None = OLD_TASK,
    reference: ReferenceKind = "as_trained",
) -> MemoryAwareSynapses:
    return MemoryAwareSynapses(strength, num_samples, dataloader, reference)


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


def definition(net: nn.Module, count: int = 40) -> Tensors:
    """Mean over samples of the absolute gradient of the squared norm of the logits."""
    net = copy.deepcopy(net).eval()
    samples = torch.cat([images for images, _ in OLD_TASK])[:count]
    sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for x in samples:
        gradients = torch.autograd.grad(net(x[None]).square().sum(), list(net.parameters()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.abs()
    return {name: total / len(samples) for name, total in sums.items()}


def loop_by_hand(
    accumulate: int = 1,
    clip: float | None = None,
    rho: float = 0.0,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> nn.Module:
    """Two epochs of plain PyTorch on loss plus penalty."""
    net = make_net()
    importance = definition(net)
    anchor = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches = make_batches()

    def backward(window: list[Batch]) -> None:
        opt.zero_grad()
        for images, labels in window:
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(net(images), labels)
            terms = [(importance[name] * (p - anchor[name]) ** 2).sum() for name, p in net.named_parameters()]
            penalty = STRENGTH * torch.stack(terms).sum()
            scaler.scale((loss + penalty) / accumulate).backward()  # type: ignore[no-untyped-call]

    for start in [*range(0, len(batches), accumulate)] * 2:
        window = batches[start : start + accumulate]
        backward(window)
        if rho:
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            kept = copy.deepcopy(net.state_dict())
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    p.add_(rho * g / norm)
            backward(window)
            net.load_state_dict(kept)
        scaler.unscale_(opt)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(opt)
        scaler.update()
    return net


def assert_equal_nets(actual: nn.Module, expected: nn.Module, atol: float = 1e-6) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.5)])
def test_equals_penalty_in_the_loss(accumulate: int, clip: float | None, rho: float) -> None:
    module, plain = Module(), Module()
    sam = [SharpnessAwareMinimization(rho=rho)] if rho else []
    make_trainer(*sam, make_callback(), accumulate=accumulate, clip=clip).fit(module, make_loader())
    assert_equal_nets(module.net, loop_by_hand(accumulate, clip, rho), atol=2e-6)
    make_trainer(*sam, accumulate=accumulate, clip=clip).fit(plain, make_loader())
    assert (
        max(float((a - b).abs().max()) for a, b in zip(module.net.buffers(), plain.net.buffers(), strict=True)) > 1e-4
    )


def test_bf16() -> None:
    module = Module()
    make_trainer(make_callback(), precision="bf16-mixed").fit(module, make_loader())
    assert_equal_nets(module.net, loop_by_hand(dtype=torch.bfloat16))


@pytest.mark.parametrize("exponent", [10, 40])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_with_a_scaler(exponent: int) -> None:
    module = Module()
    scaler, by_hand = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for _ in range(2))
    make_trainer(make_callback(), scaler=scaler, accumulate=2).fit(module, make_loader())
    assert_equal_nets(module.net, loop_by_hand(2, dtype=torch.float16, scaler=by_hand), atol=2e-6)
    assert scaler.get_scale() == by_hand.get_scale()


def test_measures_what_the_definition_says() -> None:
    callback = make_callback(num_samples=11)
    make_trainer(callback, epochs=1).fit(Module(), make_loader())
    importance = callback.state_dict()["importance"]
    expected = definition(make_net(), 11)
    assert set(importance) == {f"net.{name}" for name in expected}  # nothing for what is frozen
    for name, value in expected.items():
        torch.testing.assert_close(importance[f"net.{name}"], value, rtol=1e-4, atol=1e-6)


def test_zero_strength_is_the_plain_run() -> None:
    module, plain, callback = Module(), Module(), make_callback(strength=0, dataloader=None)
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    make_trainer().fit(plain, make_loader())
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in module.state_dict().items())
    assert not trainer.callback_metrics
    assert callback.state_dict() == {"importance": {}, "anchor": {}}


def test_measurement_leaves_no_trace() -> None:
    """A strength so small that it changes no weight leaves the plain run, random numbers included."""

    def shuffled(seed: int) -> DataLoader[tuple[Tensor, ...]]:
        images, labels = zip(*make_batches(seed), strict=True)
        return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8, shuffle=True)

    runs = []
    for callbacks in ([], [make_callback(strength=1e-30, dataloader=shuffled(2))]):
        module = Module()
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, shuffled(1))
        runs.append((module.state_dict(), torch.rand(())))
    assert all(torch.equal(runs[0][0][key], value) for key, value in runs[1][0].items())
    assert runs[0][1] == runs[1][1]


class SavesFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resume_keeps_anchor_and_importance(tmp_path: Path) -> None:
    whole, resumed, path = Module(), Module(), tmp_path / "first.ckpt"
    make_trainer(make_callback(), SavesFirstEpoch(path)).fit(whole, make_loader())
    again = make_callback(dataloader=None)  # measuring again would fail
    make_trainer(again).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal_nets(resumed.net, whole.net, atol=0)


@pytest.mark.parametrize("reference", ["as_trained", "clean"])
def test_datamodule_replays_the_previous_task(reference: ReferenceKind) -> None:
    class Replays(LightningDataModule):
        def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return make_loader()

        def reference_batches(self, device: torch.device, clean: bool = False) -> Iterator[Batch]:
            return iter([(x, y) if clean == (reference == "clean") else (x + 1, y) for x, y in OLD_TASK])

    module = Module()
    make_trainer(make_callback(dataloader=None, reference=reference)).fit(module, datamodule=Replays())
    assert_equal_nets(module.net, loop_by_hand())


def test_penalty_and_share_are_logged() -> None:
    module, callback = Module(), make_callback()
    trainer = make_trainer(callback)
    trainer.fit(module, make_loader())
    state, weights = callback.state_dict(), dict(module.named_parameters())
    terms = [(v * (weights[name] - state["anchor"][name]) ** 2).sum() for name, v in state["importance"].items()]
    torch.testing.assert_close(trainer.callback_metrics["mas/penalty"], STRENGTH * torch.stack(terms).sum().detach())
    assert 0 < trainer.callback_metrics["mas/share"] < 1


def test_warns_of_overshooting() -> None:
    largest = max(float(value.max()) for value in definition(make_net()).values())
    with pytest.warns(UserWarning, match=r"2 \* strength \* max\(Omega\) is .* = 1.5\. "):
        make_trainer(make_callback(strength=1.5 / (0.1 * largest)), epochs=1).fit(Module(), make_loader())


@pytest.mark.parametrize(
    ("dataloader", "message"),
    [
        (None, r"`MemoryAwareSynapses` needs data of the previous task. Pass `dataloader=...`"),
        ([], "`MemoryAwareSynapses` got no sample to measure the importance on. Pass a `dataloader` that is not"),
        ([(torch.full((1, 1, 6, 6), torch.inf), torch.tensor([0]))], "the importance is not finite. Check"),
    ],
)
def test_unsuitable_fits_are_refused(dataloader: list[Batch] | None, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(make_callback(dataloader=dataloader)).fit(Module(), make_loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": float("inf")}, "`strength` to be a non-negative float, but got inf"),
        ({"num_samples": 0}, "`num_samples` to be a positive integer or None, but got 0"),
        ({"chunk_size": 0}, "`chunk_size` to be a positive integer or None, but got 0"),
        ({"max_memory": -5}, "`max_memory` to be a positive integer or None, but got -5"),
        ({"gamma": 1.5}, r"`gamma` to be in \[0, 1\] or None, but got 1\.5"),
        ({"gamma": float("nan")}, r"`gamma` to be in \[0, 1\] or None, but got nan"),
        ({"reference": "poisoned"}, r"`reference` to be one of \('as_trained', 'clean'\), but got 'poisoned'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryAwareSynapses(**arguments)
