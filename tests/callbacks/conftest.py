"""What the tests of callbacks share: a user's module and its data, trainers, and a loop by hand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """How a fit is run, be it by a Trainer or by hand.

    Attributes:
        accumulate: Batches of one step.
        clip: Largest norm of the gradient.
        bf16: Whether the forward pass is in bfloat16.
        exponent: Of two: the scale that the scaler of a fit in float16 starts with.
        rho: Of SAM; 0 for none.
        sam_first: Whether SAM stands before the callback that is tested.
    """

    accumulate: int = 1
    clip: float | None = None
    bf16: bool = False
    exponent: int | None = None
    rho: float = 0.0
    sam_first: bool = True

    def autocast(self) -> AbstractContextManager[object]:
        """As Lightning's: copies of the weights that two passes share would sum their gradients in half precision."""
        if not self.bf16 and self.exponent is None:
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16 if self.bf16 else torch.float16, cache_enabled=False)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0 ** (self.exponent or 0), enabled=self.exponent is not None)


@dataclass(frozen=True)
class At:
    """Where a batch stands: in which step, at which place in it, and whether SAM passes it again."""

    step: int
    position: int
    again: bool


class Module(LightningModule):
    """A user's module. Every batch has a seed, so that the loop by hand can draw the same dropout masks."""

    def __init__(self, net: nn.Module, **sgd: Any) -> None:
        super().__init__()
        self.net, self.sgd = net, {"lr": 0.05, "momentum": 0.9, **sgd}
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        logits: Tensor = self.net(x)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), **self.sgd)


class SavesFirstEpoch(Callback):
    """A fit that may be resumed after its first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class Lab:
    """Makes what a test of a callback needs."""

    def settings(self, **values: Any) -> Settings:
        return Settings(**values)

    def net(self) -> nn.Sequential:
        """One whose output depends on mode, buffers and random numbers; always the same."""
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
        )

    def batches(self, seed: int = 1, uniform: bool = False) -> list[Batch]:
        """Five batches of eight images: with two in a step, the last step has one."""
        generator = torch.Generator().manual_seed(seed)
        images = (torch.rand if uniform else torch.randn)(5, 8, 1, 6, 6, generator=generator)
        return list(zip(images, torch.randint(3, (5, 8), generator=generator), strict=True))

    def loader(self, batches: Sequence[Batch], shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        columns = (torch.cat(column) for column in zip(*batches, strict=True))
        return DataLoader(TensorDataset(*columns), batch_size=len(batches[0][0]), shuffle=shuffle)

    def module(self, *hooks: type[LightningModule], net: nn.Module | None = None, **sgd: Any) -> Module:
        """The module of a user who overrides what ``hooks`` do; it is named after the first of them."""
        name = hooks[0].__name__ if hooks else "Module"
        made: Module = type(name, (*hooks, Module), {})(net or self.net(), **sgd)
        return made

    def trainer(
        self,
        *callbacks: Callback,
        settings: Settings | None = None,
        epochs: int = 2,
        accumulate: int = 1,
        plugins: Sequence[Any] = (),
        logger: Logger | None = None,
        log_every: int = 1,
    ) -> Trainer:
        settings = settings or Settings(accumulate)
        scaled = [] if settings.exponent is None else [MixedPrecision("16-mixed", "cpu", settings.scaler())]
        return Trainer(
            callbacks=list(callbacks),
            max_epochs=epochs,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip,
            precision="bf16-mixed" if settings.bf16 else None,
            plugins=[*scaled, *plugins],
            logger=logger or False,
            log_every_n_steps=log_every,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def saves_first_epoch(self, path: Path) -> Callback:
        return SavesFirstEpoch(path)

    def by_hand(
        self,
        net: nn.Module,
        batches: Sequence[Batch],
        loss: Callable[[Batch, At], Tensor],
        settings: Settings | None = None,
        change: Callable[[int, float], None] | None = None,
        after: Callable[[Batch], None] | None = None,
        lr: float = 0.05,
    ) -> torch.amp.GradScaler:
        """Two epochs of plain PyTorch; with ``rho``, at the weights that SAM perturbs.

        ``change`` has the step's number and the scale; it changes the gradients before they are clipped. ``after`` is
        given each batch once, after its backward pass, and the last of a step after the step.
        """
        settings = settings or Settings()
        opt, scaler = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9), settings.scaler()
        numbered = list(enumerate(batches))
        starts = range(0, len(batches), settings.accumulate)
        windows = [numbered[start : start + settings.accumulate] for start in starts] * 2

        def backward(step: int, window: list[tuple[int, Batch]], again: bool = False) -> None:
            opt.zero_grad()
            for position, (index, batch) in enumerate(window):
                torch.manual_seed(100 + index)
                with settings.autocast():
                    value = loss(batch, At(step, position, again))
                # Lightning divides by `accumulate` in a shorter last window too.
                scaler.scale(value / settings.accumulate).backward()  # type: ignore[no-untyped-call]
                if after is not None and not again and position < len(window) - 1:
                    after(batch)

        for step, window in enumerate(windows):
            backward(step, window)
            if settings.rho:
                with self._perturbed(net, settings.rho):
                    backward(step, window, again=True)
            scaler.unscale_(opt)
            if change is not None:
                change(step, scaler.get_scale())
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), settings.clip)
            scaler.step(opt)
            scaler.update()
            if after is not None:
                after(window[-1][1])
        return scaler

    @contextmanager
    def _perturbed(self, net: nn.Module, rho: float) -> Iterator[None]:
        """For SAM's second pass; weights and buffers are put back."""
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        weights, buffers = [p.detach().clone() for p in net.parameters()], [b.clone() for b in net.buffers()]
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p.add_(rho * g / norm)
        yield
        with torch.no_grad():
            for now, before in zip([*net.parameters(), *net.buffers()], [*weights, *buffers], strict=True):
                now.copy_(before)

    def assert_equal_states(self, actual: nn.Module, expected: nn.Module, atol: float = 1e-6) -> None:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(actual.state_dict()[name], value, rtol=0, atol=atol, msg=name)

    def distance(self, first: nn.Module, second: nn.Module) -> float:
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
