"""Frozen running statistics through a Trainer: what stays, what is put back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.continual.frozen_statistics import FrozenRunningStatistics
from lightning_bd.callbacks.flatness import SharpnessAwareMinimization

if TYPE_CHECKING:
    from tests.callbacks.conftest import Lab

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]

Batch = tuple[Tensor, Tensor]


class Module(LightningModule):
    def __init__(self, momentum: float | None = 0.1, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 3))
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            assert isinstance(optimizer, torch.optim.Optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    @property
    def norm(self) -> nn.BatchNorm1d:
        layer = self.net[1]
        assert isinstance(layer, nn.BatchNorm1d)
        return layer


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 8, 6, generator=generator) * 3 + 1
    return list(zip(images, torch.randint(3, (4, 8), generator=generator), strict=True))


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    images, labels = zip(*make_batches(), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


def make_trainer(*callbacks: Callback, epochs: int = 2) -> Trainer:
    return Trainer(
        callbacks=list(callbacks), max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def statistics(module: Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.norm.named_buffers()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sam", [False, True])
def test_weights_train_as_ever_and_statistics_stay(momentum: float | None, sam: bool) -> None:
    """In training mode nothing depends on the running statistics."""
    module, plain = Module(momentum), Module(momentum)
    before = statistics(module)
    flatness = [SharpnessAwareMinimization(rho=0.1)] if sam else []
    make_trainer(*flatness, FrozenRunningStatistics()).fit(module, make_loader())
    make_trainer(*flatness).fit(plain, make_loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert_equal(before, statistics(module))
    assert not torch.equal(before["running_mean"], statistics(plain)["running_mean"])
    assert module.norm.momentum == momentum
    assert module.norm.track_running_stats
    make_trainer(epochs=1).fit(module, make_loader())
    assert not torch.equal(before["running_mean"], statistics(module)["running_mean"])


def test_equals_a_momentum_of_zero() -> None:
    """What is left behind in the released code."""
    module, released = Module(), Module()
    released.norm.momentum = 0.0
    make_trainer(FrozenRunningStatistics()).fit(module, make_loader())
    make_trainer().fit(released, make_loader())
    expected = {name: value for name, value in released.state_dict().items() if "num_batches" not in name}
    assert_equal({name: module.state_dict()[name] for name in expected}, expected)


def test_manual_optimization() -> None:
    module = Module(manual=True)
    before, weight = statistics(module), module.net.state_dict()["0.weight"].clone()
    make_trainer(FrozenRunningStatistics()).fit(module, make_loader())
    assert_equal(before, statistics(module))
    assert not torch.equal(weight, module.net.state_dict()["0.weight"])


def test_a_checkpoint_holds_no_trace(lab: Lab, tmp_path: Path) -> None:
    whole, path = Module(), tmp_path / "first.ckpt"
    before = statistics(whole)
    make_trainer(FrozenRunningStatistics(), lab.saves_first_epoch(path)).fit(whole, make_loader())
    resumed = Module()
    make_trainer(FrozenRunningStatistics()).fit(resumed, make_loader(), ckpt_path=path, weights_only=True)
    assert_equal(whole.state_dict(), resumed.state_dict())
    thawed = Module()
    make_trainer().fit(thawed, make_loader(), ckpt_path=path, weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(thawed.parameters(), whole.parameters(), strict=True))
    assert not torch.equal(before["running_mean"], statistics(thawed)["running_mean"])


def test_settings_are_put_back_after_an_exception() -> None:
    class Fails(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            assert not self.norm.track_running_stats
            raise OSError("broken")

    module = Fails()
    with pytest.raises(OSError, match="broken"):
        make_trainer(FrozenRunningStatistics()).fit(module, make_loader())
    assert module.norm.track_running_stats
    assert module.norm.momentum == 0.1


def test_one_object_may_be_fitted_twice_and_without_epochs() -> None:
    module, callback = Module(), FrozenRunningStatistics()
    before = statistics(module)
    for epochs in (1, 0, 1):
        make_trainer(callback, epochs=epochs).fit(module, make_loader())
        assert module.norm.track_running_stats
    assert_equal(before, statistics(module))


def test_a_module_without_such_layers_is_refused() -> None:
    module = Module()
    module.net[1] = nn.Identity()
    with pytest.raises(MisconfigurationException, match=r"no BatchNorm layer in `Module`\. Remove the callback"):
        make_trainer(FrozenRunningStatistics()).fit(module, make_loader())
