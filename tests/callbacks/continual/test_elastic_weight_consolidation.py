"""EWC through a Trainer against loops written by hand; the module knows nothing of EWC."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bd.callbacks import ElasticWeightConsolidation
from lightning_bd.callbacks.continual.quadratic_penalty import QuadraticPenalty
from lightning_bd.functional.fisher import FisherKind, fisher_diagonal

if TYPE_CHECKING:
    from tests.callbacks.conftest import Batch, Lab
    from tests.callbacks.continual.conftest import ConsolidationMethod

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


@pytest.mark.parametrize("kind", ["exact", "sampled", "weighted"])
def test_kinds_of_fisher_information(lab: Lab, ewc: ConsolidationMethod, kind: FisherKind) -> None:
    module, callback = ewc.module(), ewc.callback(fisher=kind)
    lab.trainer(callback).fit(module, ewc.loader())
    if kind != "sampled":
        lab.assert_equal_states(module.net, ewc.by_hand(kind=kind).net, ewc.atol)
    again, other = ewc.callback(fisher=kind), ewc.callback(fisher=kind, seed=1)
    for repeated in (again, other):
        lab.trainer(repeated, epochs=1).fit(ewc.module(), ewc.loader())
    weight = "net.5.weight"
    first, second, third = (c.state_dict()["fisher"][weight] for c in (callback, again, other))
    assert torch.equal(first, second)
    assert torch.equal(first, third) == (kind != "sampled")


def test_datamodule_replays_the_previous_task(lab: Lab, ewc: ConsolidationMethod) -> None:
    class ReplaysOldTask(LightningDataModule):
        """It does not know of clean references."""

        def __init__(self) -> None:
            super().__init__()
            self.devices: list[torch.device] = []

        def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return ewc.loader()

        def reference_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor, str]]:
            self.devices.append(device)
            for images, labels in ewc.old_task():
                yield images.to(device), labels.to(device), "what else a batch may hold"

    module, data = ewc.module(), ReplaysOldTask()
    lab.trainer(ewc.callback(dataloader=None)).fit(module, datamodule=data)
    lab.assert_equal_states(module.net, ewc.by_hand().net, ewc.atol)
    assert data.devices == [torch.device("cpu")]


def test_dataloader_passes_through_the_hooks_of_the_module(lab: Lab, ewc: ConsolidationMethod) -> None:
    class Prepares(LightningModule):
        def on_before_batch_transfer(self, batch: Batch | dict[str, Batch], dataloader_idx: int) -> Batch:
            return batch["pair"] if isinstance(batch, dict) else batch

        def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
            return batch[0] / 2, batch[1]

    callback = ewc.callback(dataloader=[{"pair": (x * 2, y)} for x, y in ewc.old_task()])
    lab.trainer(callback, epochs=1).fit(ewc.module(Prepares), ewc.loader())
    expected = fisher_diagonal(ewc.module().net, ewc.old_task())
    for name, value in callback.state_dict()["fisher"].items():
        torch.testing.assert_close(value, expected[name.removeprefix("net.")])


def test_num_samples_and_memory_options(lab: Lab, ewc: ConsolidationMethod) -> None:
    callback = ewc.callback(num_samples=11, chunk_size=3, max_memory=1000)
    module = ewc.module()
    expected = fisher_diagonal(module.net, ewc.old_task(), num_samples=11)
    lab.trainer(callback, epochs=1).fit(module, ewc.loader())
    fisher = callback.state_dict()["fisher"]
    assert set(fisher) == {f"net.{name}" for name in expected}  # nothing for what is frozen
    for name, value in expected.items():
        torch.testing.assert_close(fisher[f"net.{name}"], value)


def test_second_fit_anchors_anew(lab: Lab, ewc: ConsolidationMethod, tmp_path: Path) -> None:
    callback, module = ewc.callback(), ewc.module()
    lab.trainer(callback, epochs=1).fit(module, ewc.loader())
    first = copy.deepcopy(callback.state_dict())
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    lab.trainer(callback, epochs=1).fit(module, ewc.loader())
    second = callback.state_dict()
    assert all(torch.equal(second["anchor"][name], value) for name, value in weights.items())
    assert not torch.equal(first["fisher"]["net.5.weight"], second["fisher"]["net.5.weight"])


def test_parameters_frozen_later_or_without_gradient(lab: Lab, ewc: ConsolidationMethod) -> None:
    net, extra, use_extra = ewc.lab.net(), nn.Linear(64, 3), [True]

    class Freezes(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            features = net[:5](x)
            logits: Tensor = net[5](features)
            return logits + extra(features) if use_extra[-1] else logits

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

        def on_train_start(self) -> None:
            use_extra.append(False)
            net[0].requires_grad_(False)
            with torch.no_grad():
                extra.weight += 0.1

    module, callback = ewc.module(Freezes, net=net), ewc.callback()
    module.extra = extra
    lab.trainer(callback, epochs=1).fit(module, ewc.loader())
    state = callback.state_dict()
    assert torch.equal(module.net.state_dict()["0.weight"], state["anchor"]["net.0.weight"])
    # The penalty alone moves a layer that the loss does not use: five steps of plain gradient descent.
    fisher, distance = state["fisher"]["extra.weight"], torch.full((3, 64), 0.1)
    expected = distance * (1 - 0.05 * 2 * ewc.strength * fisher) ** 5
    torch.testing.assert_close(extra.weight - state["anchor"]["extra.weight"], expected, atol=1e-6, rtol=1e-4)


def test_unused_parameters_are_left_alone(lab: Lab, ewc: ConsolidationMethod) -> None:
    class Decays(LightningModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.1)

    module, unused = ewc.module(Decays), nn.Linear(2, 2)
    module.unused = unused
    before = unused.weight.detach().clone()
    lab.trainer(ewc.callback(), epochs=1).fit(module, ewc.loader())
    assert unused.weight.grad is None
    assert torch.equal(unused.weight, before)


def test_half_precision_weights(lab: Lab, ewc: ConsolidationMethod) -> None:
    module, callback = ewc.module(), ewc.callback()
    trainer = lab.trainer(callback, epochs=1, plugins=[HalfPrecision("bf16-true")])
    trainer.fit(module, ewc.loader())
    assert callback.state_dict()["fisher"]["net.5.weight"].dtype == torch.float32
    assert callback.state_dict()["anchor"]["net.5.weight"].dtype == torch.bfloat16
    assert trainer.callback_metrics["ewc/penalty"] > 0


def test_penalty_and_share_are_logged(lab: Lab, ewc: ConsolidationMethod) -> None:
    losses: list[Tensor] = []

    class Remembers(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            losses.append(loss.detach())
            return loss

    module, callback = ewc.module(Remembers), ewc.callback()
    trainer = lab.trainer(callback, accumulate=2)
    trainer.fit(module, ewc.loader())
    state = {
        key: {name.removeprefix("net."): value for name, value in tensors.items()}
        for key, tensors in callback.state_dict().items()
    }
    value = ewc.penalty(module.net, state["fisher"], state["anchor"]).detach()
    assert value > 0
    torch.testing.assert_close(trainer.callback_metrics["ewc/penalty"], value)
    share = value / (value + losses[-1])
    torch.testing.assert_close(trainer.callback_metrics["ewc/share"], share)


def test_logs_when_the_loggers_do(
    lab: Lab, ewc: ConsolidationMethod, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = 0
    original = QuadraticPenalty.value

    def count(self: QuadraticPenalty) -> Tensor:
        nonlocal values
        values += 1
        return original(self)

    monkeypatch.setattr(QuadraticPenalty, "value", count)
    logger = CSVLogger(tmp_path)
    trainer = lab.trainer(ewc.callback(), epochs=3, accumulate=2, logger=logger, log_every=4)
    trainer.fit(ewc.module(), ewc.loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["ewc/penalty"]]
    assert [row["step"] for row in rows] == ["3", "7"]  # of nine steps, counted from 0
    assert all(float(row["ewc/penalty"]) > 0 and 0 < float(row["ewc/share"]) < 1 for row in rows)
    assert values == 2


def test_warns_of_overshooting(lab: Lab, ewc: ConsolidationMethod) -> None:
    # lr * 2 * strength * max F: the message holds the product.
    module = ewc.module()
    largest = max(float(f.max()) for f in fisher_diagonal(module.net, ewc.old_task()).values())
    strength = 1.5 / (0.05 * 2 * largest)
    with pytest.warns(
        UserWarning, match=r"learning rate times 2 \* strength \* max\(F\) is .* = 1.5\. .*Lower `strength`"
    ):
        lab.trainer(ewc.callback(strength=strength), epochs=1).fit(module, ewc.loader())
    # Below 1 there is no warning, which would be an error here.
    lab.trainer(ewc.callback(strength=strength / 2), epochs=1).fit(ewc.module(), ewc.loader())


def test_warning_knows_the_rate_after_a_warm_up(lab: Lab, ewc: ConsolidationMethod) -> None:
    class WarmsUp(LightningModule):
        def configure_optimizers(self) -> OptimizerLRScheduler:
            optimizer = super().configure_optimizers()
            assert isinstance(optimizer, torch.optim.Optimizer)
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1e-6)]

    largest = max(float(f.max()) for f in fisher_diagonal(lab.net(), ewc.old_task()).values())
    with pytest.warns(UserWarning, match="overshoots"):
        lab.trainer(ewc.callback(strength=1.5 / (0.1 * largest)), epochs=1).fit(ewc.module(WarmsUp), ewc.loader())


def test_exception_lets_go_of_the_module(lab: Lab, ewc: ConsolidationMethod) -> None:
    class Fails(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
            raise OSError("broken")

    callback = ewc.callback()
    module = ewc.module(Fails)
    with pytest.raises(OSError, match="broken"):
        lab.trainer(callback).fit(module, ewc.loader())
    assert callback._penalty is None
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("dataloader", "message"),
    [
        (None, r"Pass `dataloader=...`, or fit with a datamodule that has `reference_batches"),
        ([], "got no sample .* Pass a `dataloader` that is not empty"),
        ([(torch.full((1, 1, 6, 6), torch.inf), torch.tensor([0]))], "is not finite. Check"),
    ],
)
def test_unsuitable_data_is_refused(
    lab: Lab, ewc: ConsolidationMethod, dataloader: list[Batch] | None, message: str
) -> None:
    trainer = lab.trainer(ewc.callback(dataloader=dataloader))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(ewc.module(), ewc.loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, r"`strength` to be a non-negative float, but got -1\.0"),
        ({"strength": float("nan")}, "`strength` to be a non-negative float, but got nan"),
        ({"fisher": "true"}, r"`fisher` to be one of \('empirical', .* but got 'true'"),
        ({"num_samples": 0}, "`num_samples` to be a positive integer or None, but got 0"),
        ({"chunk_size": 0}, "`chunk_size` to be a positive integer or None, but got 0"),
        ({"max_memory": -5}, "`max_memory` to be a positive integer or None, but got -5"),
        ({"gamma": -0.1}, r"`gamma` to be in \[0, 1\] or None, but got -0\.1"),
        ({"reference": "poisoned"}, r"`reference` to be one of \('as_trained', 'clean'\), but got 'poisoned'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticWeightConsolidation(**arguments)
