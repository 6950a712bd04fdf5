"""What every phase's Trainer carries, with real Trainers and with devices that are not at hand."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_bd import phase_callbacks
from lightning_bd.checkpointing import RECORD_KEY, read_checkpoint
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.functional.draws import keyed_seed
from lightning_bd.manifest import PoisonManifest
from lightning_bd.phase_callbacks import (
    ElapsedTime,
    EpochCheckpoint,
    NonFiniteLossError,
    RunRecord,
    SeedEachBatch,
    StopOnNonFiniteLoss,
    TriggerPreview,
)
from lightning_bd.phase_logger import PhaseTensorBoardLogger
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

BATCHES = 3


class Loader:
    """Lightning takes a list for several loaders."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.tensor([[1.0]])] * BATCHES)


class Module(LightningModule):
    """Draws from every global state, and does what the test asks for before each batch."""

    def __init__(self, before: Callable[[int], float] = lambda number: 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.before = before
        self.number = 0
        self.draws: list[tuple[float, float, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.draws.append((torch.rand(1).item(), float(np.random.rand()), random.random()))
        loss: Tensor = self.layer(batch).sum().square() * self.before(self.number)
        self.number += 1
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, module: Module, *callbacks: Callback, epochs: int = 2, resume: Path | None = None) -> None:
    """Fit with a checkpoint after each epoch, ``0.ckpt``, ``1.ckpt``, ..."""
    saver = ModelCheckpoint(folder, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, saver], default_root_dir=folder,
    ).fit(module, Loader(), ckpt_path=resume, weights_only=True)  # fmt: skip


def draws(folder: Path, seed: int = 0, phase: str = "inject", resume: Path | None = None) -> list[tuple[float, ...]]:
    torch.manual_seed(len(str(folder)))  # whatever was drawn before
    module = Module()
    fit(folder, module, SeedEachBatch(seed, phase), resume=resume)
    return list(module.draws)


def test_each_batch_is_seeded_by_its_key(tmp_path: Path) -> None:
    found = draws(tmp_path / "a", seed=3, phase="inject")
    expected = []
    for step in range(2 * BATCHES):
        seed = keyed_seed(3, "inject", "batch", step, 0)
        one = np.random.RandomState(seed % 2**32).rand()
        expected.append(
            (torch.rand(1, generator=torch.Generator().manual_seed(seed)).item(), one, random.Random(seed).random())
        )
    assert found == expected
    assert all(len(set(column)) == 2 * BATCHES for column in zip(*found, strict=True))


def test_draws_are_the_same_again_and_after_a_resume(tmp_path: Path) -> None:
    whole = draws(tmp_path / "a")
    assert draws(tmp_path / "another") == whole
    assert draws(tmp_path / "a", resume=tmp_path / "a" / "0.ckpt") == whole[BATCHES:]


def test_draws_differ_by_seed_and_phase(tmp_path: Path) -> None:
    runs = [draws(tmp_path / str(n), *key) for n, key in enumerate([(0, "a"), (1, "a"), (0, "b")])]
    assert all(len(set(step)) == 3 for step in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_the_phase(tmp_path: Path, bad: float) -> None:
    module = Module(lambda number: bad if number == BATCHES + 1 else 1.0)
    last = tmp_path / "0.ckpt"
    with pytest.raises(
        NonFiniteLossError,
        match=rf"Phase `inject`: the loss is not finite at step {BATCHES + 1} \(epoch 1\); the last good checkpoint is "
        r".*0\.ckpt\. Lower the learning rate, or set the phase's `trainer: \{gradient_clip_val",
    ):
        fit(tmp_path, module, StopOnNonFiniteLoss("inject", last))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.ckpt"]
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(last)["state_dict"].values())


def test_a_bad_first_epoch_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"at step 0 \(epoch 0\); no epoch was complete, so there is no checkpoint"
    ):
        fit(tmp_path, Module(lambda number: math.nan), StopOnNonFiniteLoss("inject", tmp_path / "0.ckpt"))
    assert list(tmp_path.iterdir()) == []


def test_finite_losses_pass(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, StopOnNonFiniteLoss("inject", tmp_path / "0.ckpt"), epochs=1)
    assert module.number == BATCHES


class Elsewhere(TorchFunctionMode):
    """Tensors say that they are on an accelerator, and every wait for it is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return torch.device("cuda")
        if func in (Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.cpu, Tensor.tolist):
            self.waits += 1
        kwargs.pop("device", None)
        return func(*args, **kwargs)


def at_step(step: int) -> Trainer:
    return cast(
        Trainer, SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=step), current_epoch=step // 10, world_size=1)
    )


def watch(losses: list[object], interval: int, waits: int | None = None) -> None:
    """Show losses on an accelerator to a new callback, as one epoch."""
    callback, module = StopOnNonFiniteLoss("inject", Path("gone.ckpt"), interval), Module()
    with Elsewhere() as device:
        for step, loss in enumerate(losses):
            callback.on_train_batch_end(at_step(step), module, cast(Any, loss), None, step)
        if waits is not None:
            assert device.waits == waits
        callback.on_train_epoch_end(at_step(len(losses) - 1), module)


def test_an_accelerator_is_waited_for_once_per_interval() -> None:
    watch([torch.tensor(1.0)] * 25, interval=10, waits=2)


@pytest.mark.parametrize(
    ("bad", "epoch"), [([3], 0), ([3, 4, 5], 0), ([10], 1), ([12], 1), ([9], 0), ([0, 20], 0), ([24, 23], 2)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_bad_step_on_an_accelerator_is_named(bad: list[int], epoch: int, value: float) -> None:
    losses: list[object] = [torch.tensor(value if step in bad else 1.0) for step in range(25)]
    with pytest.raises(
        NonFiniteLossError, match=rf"the loss is not finite at step {min(bad)} \(epoch {epoch}\); no epoch"
    ):
        watch(losses, interval=10)


def test_a_loss_may_be_in_a_mapping_or_missing() -> None:
    watch([{"loss": torch.tensor(1.0)}, None, {"loss": None}], interval=1)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        watch([None, {"loss": torch.tensor(1.0)}, {"loss": torch.tensor(math.nan)}], interval=50)
    callback = StopOnNonFiniteLoss("inject", Path("gone.ckpt"))
    with pytest.raises(NonFiniteLossError, match="step 7"):
        callback.on_train_batch_end(at_step(7), Module(), {"loss": torch.tensor(math.nan)}, None, 7)


def test_elapsed_time_goes_on_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second per batch; the time between the attempts is not counted."""
    now = [100.0]
    monkeypatch.setattr(phase_callbacks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def tick(number: int) -> float:
        now[0] += 1
        return 1.0

    whole, again = ElapsedTime(), ElapsedTime()
    assert whole.seconds == 0
    fit(tmp_path, Module(tick), whole)
    assert whole.seconds == 2 * BATCHES
    now[0] += 1000
    assert whole.seconds == 2 * BATCHES, "the clock stands after the fit"
    fit(tmp_path, Module(tick), again, resume=tmp_path / "0.ckpt")
    assert again.seconds == 2 * BATCHES


def poisoned_digits() -> DigitsDataModule:
    return DigitsDataModule(Poison(BadNets(size=2, seed=1), rate=0.1, target=3))


def test_the_record_is_in_each_checkpoint_and_read_without_trust(tmp_path: Path) -> None:
    manifest = poisoned_digits().manifest()
    assert manifest is not None
    fit(tmp_path, Module(), RunRecord("inject", manifest, "a: 1\n"), epochs=1)
    record = read_checkpoint(tmp_path / "0.ckpt")[RECORD_KEY]
    assert (record["phase"], record["config"], record["processes"]) == ("inject", "a: 1\n", 1)
    restored = PoisonManifest.from_plain(record["manifest"], record["tensors"])
    assert restored.differences(manifest) == []
    assert restored.plain() == manifest.plain()


def test_a_record_without_a_poison(tmp_path: Path) -> None:
    fit(tmp_path, Module(), RunRecord("inject", None, None), epochs=1)
    record = read_checkpoint(tmp_path / "0.ckpt")[RECORD_KEY]
    assert (record["manifest"], record["tensors"], record["config"]) == (None, {}, None)
    fit(tmp_path, Module(), RunRecord("inject", None, None), epochs=2, resume=tmp_path / "0.ckpt")


def test_another_number_of_processes_cannot_resume(tmp_path: Path) -> None:
    fit(tmp_path, Module(), RunRecord("inject", None, None), epochs=1)
    checkpoint = read_checkpoint(tmp_path / "0.ckpt")
    checkpoint[RECORD_KEY]["processes"] = 4
    torch.save(checkpoint, tmp_path / "0.ckpt")
    module = Module()
    with pytest.raises(
        MisconfigurationException,
        match=r"Phase `inject` was cut while it ran on 4 processes and cannot go on with 1: the batches would differ",
    ):
        fit(tmp_path, module, RunRecord("inject", None, None), resume=tmp_path / "0.ckpt")
    assert module.number == 0


def as_trainer(first: bool = True, loggers: tuple[object, ...] = ()) -> Trainer:
    return cast(Trainer, SimpleNamespace(is_global_zero=first, loggers=list(loggers)))


def cells(file: Path, count: int) -> Tensor:
    """Cut the picture into ``(3, count, 8, 8)``: each of the digits' pixels is 12 wide, with 4 between the images."""
    with Image.open(file) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("L"))).float() / 255
    assert pixels.shape == (3 * 100 + 4, count * 100 + 4)
    grid = torch.stack(
        [torch.stack([pixels[4 + 100 * r :, 4 + 100 * c :][:96, :96] for c in range(count)]) for r in range(3)]
    )
    blocks = grid.reshape(3, count, 8, 12, 8, 12)
    assert (blocks.amax((3, 5)) == blocks.amin((3, 5))).all(), "every pixel is a square"
    return blocks[:, :, :, 0, :, 0]


@pytest.mark.parametrize("count", [8, 5])
def test_the_preview_shows_clean_triggered_and_difference(tmp_path: Path, count: int) -> None:
    data = poisoned_digits()
    TriggerPreview(data, tmp_path, count).on_fit_start(as_trainer(), Module())
    clean, triggered, difference = cells(tmp_path / "trigger.png", count)
    images = data.test_images
    stored = images.read(torch.arange(len(images)))[:, 0] / 255
    victims = stored[images.labels != 3]
    for image in clean:
        assert (victims - image).abs().amax((1, 2)).min() < 0.01
    assert torch.allclose(clean[0], victims[0], atol=0.01)
    assert torch.allclose(clean[-1], victims[-1], atol=0.01)
    trigger = BadNets(size=2, seed=1)
    trigger.build((1, 8, 8))
    expected = trigger(clean[:, None])[:, 0]
    assert torch.allclose(triggered, expected, atol=0.01)
    change = (expected - clean).abs()
    assert change.max() > 0.1
    assert torch.allclose(difference, change / change.max(), atol=0.03)


def test_the_preview_is_drawn_once_per_run(tmp_path: Path) -> None:
    preview = TriggerPreview(poisoned_digits(), tmp_path)
    preview.on_fit_start(as_trainer(first=False), Module())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "trigger.png").write_text("kept", encoding="utf-8")
    preview.on_fit_start(as_trainer(), Module())
    assert (tmp_path / "trigger.png").read_text(encoding="utf-8") == "kept"


def test_clean_data_has_no_preview(tmp_path: Path) -> None:
    TriggerPreview(DigitsDataModule(), tmp_path).on_fit_start(as_trainer(), Module())
    assert list(tmp_path.iterdir()) == []


def test_the_preview_leaves_data_and_random_state_alone(tmp_path: Path) -> None:
    data = poisoned_digits()
    data.setup()
    before = data.test_images.read(torch.arange(10))
    module = Module()
    state = torch.get_rng_state()
    TriggerPreview(data, tmp_path).on_fit_start(as_trainer(), module)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.test_images.read(torch.arange(10)), before)


def test_the_preview_is_in_tensorboard(tmp_path: Path) -> None:
    logger = PhaseTensorBoardLogger(tmp_path / "00_inject", 0)
    TriggerPreview(poisoned_digits(), tmp_path).on_fit_start(as_trainer(loggers=(logger, object())), Module())
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    [image] = events.Images("trigger (clean, triggered, difference)")
    with Image.open(tmp_path / "trigger.png") as picture:
        assert (image.width, image.height) == picture.size


class Explodes(Callback):
    """Makes a weight infinite after the last step of an epoch, whose loss was finite."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        if trainer.current_epoch == self.epoch and trainer.is_last_batch:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(torch.inf)


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    stop = StopOnNonFiniteLoss("inject", last)
    with pytest.raises(
        NonFiniteLossError, match=r"`inject`: a weight is not finite at step .* the last good checkpoint"
    ):
        fit(tmp_path, Module(), Explodes(1), stop, EpochCheckpoint(tmp_path), epochs=3)
    assert all(bool(torch.isfinite(t).all()) for t in read_checkpoint(last)["state_dict"].values())


@pytest.mark.parametrize(("interval", "written"), [(0.0, [1, 2, 3]), (1.5, [2]), (100.0, [])])
def test_checkpoints_are_written_at_most_once_per_interval(
    interval: float, written: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One second passes per epoch.
    epochs: list[int] = []
    callback = EpochCheckpoint(tmp_path, interval)
    monkeypatch.setattr(callback, "_written", 0.0)
    now = [0.0]
    monkeypatch.setattr("lightning_bd.phase_callbacks.time.monotonic", lambda: now[0])

    class Clock(Callback):
        """Comes before the checkpoint's hook and notes whether the one before it was written."""

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            now[0] += 1.0

        def on_save_checkpoint(
            self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
        ) -> None:
            epochs.append(trainer.current_epoch + 1)

    Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Clock(), callback], default_root_dir=tmp_path,
    ).fit(Module(), Loader())  # fmt: skip
    assert epochs == written
