"""Memory aware synapses through a Trainer against loops written by hand; the module knows nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bd.callbacks.continual.memory_aware_synapses import MemoryAwareSynapses
from lightning_bd.callbacks.continual.reference import ReferenceKind

if TYPE_CHECKING:
    from tests.callbacks.conftest import Batch, Lab
    from tests.callbacks.continual.conftest import SynapsesMethod

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


def test_measures_what_the_definition_says(lab: Lab, mas: SynapsesMethod) -> None:
    callback = mas.callback(num_samples=11)
    lab.trainer(callback, epochs=1).fit(mas.module(), mas.loader())
    importance = callback.state_dict()["importance"]
    expected = mas.definition(lab.net(), 11)
    assert set(importance) == {f"net.{name}" for name in expected}  # nothing for what is frozen
    for name, value in expected.items():
        torch.testing.assert_close(importance[f"net.{name}"], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reference", ["as_trained", "clean"])
def test_datamodule_replays_the_previous_task(lab: Lab, mas: SynapsesMethod, reference: ReferenceKind) -> None:
    class Replays(LightningDataModule):
        def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return mas.loader()

        def reference_batches(self, device: torch.device, clean: bool = False) -> Iterator[Batch]:
            return iter([(x, y) if clean == (reference == "clean") else (x + 1, y) for x, y in mas.old_task()])

    module = mas.module()
    lab.trainer(mas.callback(dataloader=None, reference=reference)).fit(module, datamodule=Replays())
    lab.assert_equal_states(module.net, mas.by_hand().net, mas.atol)


def test_penalty_and_share_are_logged(lab: Lab, mas: SynapsesMethod) -> None:
    module, callback = mas.module(), mas.callback()
    trainer = lab.trainer(callback)
    trainer.fit(module, mas.loader())
    state, weights = callback.state_dict(), dict(module.named_parameters())
    terms = [(v * (weights[name] - state["anchor"][name]) ** 2).sum() for name, v in state["importance"].items()]
    torch.testing.assert_close(
        trainer.callback_metrics["mas/penalty"], mas.strength * torch.stack(terms).sum().detach()
    )
    assert 0 < trainer.callback_metrics["mas/share"] < 1


def test_warns_of_overshooting(lab: Lab, mas: SynapsesMethod) -> None:
    largest = max(float(value.max()) for value in mas.definition(lab.net()).values())
    with pytest.warns(UserWarning, match=r"2 \* strength \* max\(Omega\) is .* = 1.5\. "):
        lab.trainer(mas.callback(strength=1.5 / (0.1 * largest)), epochs=1).fit(mas.module(), mas.loader())


@pytest.mark.parametrize(
    ("dataloader", "message"),
    [
        (None, r"`MemoryAwareSynapses` needs data of the previous task. Pass `dataloader=...`"),
        ([], "`MemoryAwareSynapses` got no sample to measure the importance on. Pass a `dataloader` that is not"),
        ([(torch.full((1, 1, 6, 6), torch.inf), torch.tensor([0]))], "the importance is not finite. Check"),
    ],
)
def test_unsuitable_fits_are_refused(
    lab: Lab, mas: SynapsesMethod, dataloader: list[Batch] | None, message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        lab.trainer(mas.callback(dataloader=dataloader)).fit(mas.module(), mas.loader())


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
