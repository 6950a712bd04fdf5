"""A second pass with the learning rate at 0 is a plain run, to the last bit, in all that a user can see."""

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision

from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.callbacks.isolation import IsolatedPass, RandomState, copy_tensors, overwrite

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


class Memory(Logger):
    """A logger that remembers all that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: object) -> None:
        """Nothing to remember."""


class Talkative(LightningModule):
    """Uses all that a second pass could disturb."""

    queue: Tensor
    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)),
        )  # fmt: skip
        self.accuracy = MulticlassAccuracy(3)
        self.same_accuracy = self.accuracy
        # Its cached result hangs on the graph of the step.
        self.error = MeanSquaredError()
        self.metrics = MetricCollection([MulticlassF1Score(3), MulticlassPrecision(3)])
        self.nested = nn.ModuleDict({"noise": CatMetric()})
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("constant", torch.ones(1).expand(5))
        self.register_buffer("empty", None)
        self.calls = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        images, labels = batch
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        logits = self.net(images + noise)
        self.queue.add_(1)  # in place
        self.center = 0.9 * self.center + 0.1 * logits.detach().mean(0)  # by assignment
        self.error(logits, F.one_hot(labels, 3).float())
        self.accuracy(logits, labels)
        self.metrics(logits, labels)
        cast(CatMetric, self.nested["noise"])(noise)
        loss = F.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "error": self.error}, on_epoch=True)
        assert self.logger is not None
        self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute())
        self.log("nested", cast(CatMetric, self.nested["noise"]).compute().std())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Speaker(Callback):
    """Logs from the hooks that run in both passes, in both ways that Lightning offers."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.log("callback", loss)  # type: ignore[attr-defined]
        pl_module.log("module", loss)


def run(*callbacks: Callback) -> tuple[Talkative, Trainer, list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 16, generator=generator), torch.arange(24) % 3)
    logger, module = Memory(), Talkative()
    trainer = Trainer(
        callbacks=[*callbacks, Speaker()], accelerator="cpu", logger=logger, max_epochs=2, log_every_n_steps=1,
        accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(2)
    np.random.seed(3)
    random.seed(4)
    trainer.fit(module, DataLoader(data, batch_size=6, shuffle=True))
    streams = [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]
    return module, trainer, logger.rows, streams


def test_second_pass_leaves_no_trace() -> None:
    module, trainer, rows, streams = run(SharpnessAwareMinimization(rho=1.0))
    plain_module, plain_trainer, plain_rows, plain_streams = run()
    assert module.calls == 2 * plain_module.calls == 16
    assert rows == plain_rows
    assert len(rows) == 14
    assert streams == plain_streams
    assert trainer.callback_metrics == plain_trainer.callback_metrics
    assert {"loss_epoch", "callback", "module", "nested"} < trainer.callback_metrics.keys()
    for name, value in plain_module.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert module.queue[0] == plain_module.queue[0] == 8
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain_module.named_modules()]
    assert module.accuracy is module.same_accuracy


def make_trainer(*callbacks: Callback) -> Trainer:
    return Trainer(callbacks=list(callbacks), accelerator="cpu", logger=Memory(), enable_checkpointing=False)


def test_everything_is_put_back_after_an_exception() -> None:
    module = Talkative()
    trainer = make_trainer(Speaker())
    # A log function of the user's own, on the instance.
    module.log = log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    modules, buffers, loggers = list(module.modules()), copy_tensors(list(module.buffers())), trainer.loggers
    queue, attributes = module.queue, set(vars(module))
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)

    def spoil() -> None:
        with IsolatedPass(trainer, module):
            assert trainer.loggers != loggers
            assert module.log is not log
            torch.rand(1)
            module.queue = torch.rand(4)
            module.center.add_(1)
            module.accuracy.update(torch.tensor([1]), torch.tensor([1]))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        spoil()
    assert torch.equal(torch.rand(2), expected)
    assert list(module.modules()) == modules
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))
    assert module.queue is queue
    assert trainer.loggers is loggers
    assert module.log is log
    assert set(vars(module)) == attributes
    assert module.accuracy.update_count == 0


def test_stand_ins_start_empty_every_time() -> None:
    module = Talkative()
    isolated = IsolatedPass(make_trainer(), module)
    module.accuracy.update(torch.tensor([1]), torch.tensor([1]))
    for _ in range(2):
        with isolated:
            assert module.accuracy is module.same_accuracy
            assert module.accuracy.update_count == 0
            module.accuracy.update(torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert module.accuracy.update_count == 1
    assert module.accuracy.compute() == 1


def test_a_metric_that_takes_the_place_of_another_gets_a_stand_in_of_its_own() -> None:
    module = Talkative()
    isolated = IsolatedPass(make_trainer(), module)
    for classes in (3, 5, 7):
        module.accuracy = module.same_accuracy = MulticlassAccuracy(classes)
        with isolated:
            assert module.accuracy.num_classes == classes


def test_random_state_covers_every_stream() -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    state = RandomState(torch.device("cpu"))
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_state_covers_the_device() -> None:
    state = RandomState(torch.device("cuda", 0))
    first = torch.rand(2, device="cuda")
    state.restore()
    assert torch.equal(torch.rand(2, device="cuda"), first)


def test_random_state_asks_for_the_given_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the current one, of several."""
    device = torch.device("cuda", 1)
    streams = {torch.device("cuda", 0): torch.zeros(1), device: torch.ones(1)}

    def get_rng_state(which: torch.device = torch.device("cuda", 0)) -> Tensor:  # noqa: B008
        return streams[which]

    def set_rng_state(state: Tensor, which: torch.device = torch.device("cuda", 0)) -> None:  # noqa: B008
        streams[which] = state

    module = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    state = RandomState(device)
    streams[device] = torch.full((1,), 2.0)
    state.restore()
    assert {place.index: stream.item() for place, stream in streams.items()} == {0: 0.0, 1: 1.0}


def test_random_state_is_seeded_and_put_back() -> None:
    before, state = torch.get_rng_state(), RandomState(torch.device("cpu"))
    state.seed(3)
    drawn = torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(3)))
    state.restore()
    assert torch.equal(torch.get_rng_state(), before)


def test_copy_tensors_keeps_values_dtypes_and_strides() -> None:
    tensors = [
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        nn.Parameter(torch.tensor([float("nan"), -0.0])),
        torch.arange(3),
        torch.tensor(True),
        torch.randn(2, dtype=torch.float64),
    ]
    copies = copy_tensors(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        torch.testing.assert_close(copy, tensor.detach(), rtol=0, atol=0, equal_nan=True)
        assert copy.stride() == tensor.stride()
        assert copy.data_ptr() != tensor.data_ptr()
        assert not copy.requires_grad
    assert torch.signbit(copies[1][1])


def test_overwrite_is_in_place() -> None:
    targets = [nn.Parameter(torch.zeros(2)), torch.zeros(2, dtype=torch.int64)]
    pointers = [target.data_ptr() for target in targets]
    overwrite(targets, [torch.ones(2), torch.tensor([5, 6])])
    assert [target.tolist() for target in targets] == [[1.0, 1.0], [5, 6]]
    assert [target.data_ptr() for target in targets] == pointers
