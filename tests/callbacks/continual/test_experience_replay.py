"""Experience replay through a Trainer against a loop written by hand; the module knows nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import HalfPrecision
from torch.nn import functional as F

from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay
from lightning_bd.callbacks.continual.replay_buffer import ReplayBuffer
from lightning_bd.callbacks.flatness.sharpness_aware_minimization import SharpnessAwareMinimization

if TYPE_CHECKING:
    from tests.callbacks.conftest import Lab
    from tests.callbacks.continual.conftest import ExperienceMethod

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_current_samples_may_be_offered_after_their_batch(lab: Lab, replay: ExperienceMethod, accumulate: int) -> None:
    module, callback = replay.module(), replay.callback(insert_current=True)
    callbacks = [callback, SharpnessAwareMinimization(rho=0.2)]
    settings = lab.settings(accumulate=accumulate, rho=0.2)
    lab.trainer(*callbacks, settings=settings).fit(module, replay.loader())
    lab.assert_equal_states(module.net, replay.by_hand(settings, insert_current=True).net, replay.atol)
    assert callback.state_dict()["buffer"]["seen"] == 40 + 80
    assert lab.distance(module.net, replay.by_hand(settings).net) > 1e-3


def test_default_holds_the_previous_task_alone(lab: Lab, replay: ExperienceMethod) -> None:
    callback, buffer = replay.callback(), ReplayBuffer(replay.capacity)
    lab.trainer(callback).fit(replay.module(), replay.loader())
    for batch in replay.old_task():
        buffer.insert(*batch)
    state, expected = callback.state_dict()["buffer"], buffer.state_dict()
    assert state["seen"] == 40
    assert torch.equal(state["images"], expected["images"])
    assert torch.equal(state["labels"], expected["labels"])


def test_datamodule_replays_the_previous_task(lab: Lab, replay: ExperienceMethod) -> None:
    data, module = replay.datamodule(), replay.module()
    lab.trainer(replay.callback(dataloader=None)).fit(module, datamodule=data)
    lab.assert_equal_states(module.net, replay.by_hand().net, replay.atol)
    lab.trainer(ExperienceReplay(reference="clean"), epochs=1).fit(replay.module(), datamodule=data)
    assert data.asked == [(torch.device("cpu"), False), (torch.device("cpu"), True)]


@pytest.mark.parametrize("insert_current", [False, True])
def test_resume_goes_on_with_the_buffer(
    lab: Lab, replay: ExperienceMethod, tmp_path: Path, insert_current: bool
) -> None:
    whole, resumed, path = replay.module(), replay.module(), tmp_path / "first.ckpt"
    callback = replay.callback(insert_current=insert_current)
    again = replay.callback(dataloader=None, insert_current=insert_current)  # filling again would fail
    lab.trainer(callback, lab.saves_first_epoch(path), accumulate=2).fit(whole, replay.loader())
    lab.trainer(again, accumulate=2).fit(resumed, replay.loader(), ckpt_path=path, weights_only=True)
    lab.assert_equal_states(resumed.net, whole.net, atol=0)
    states = callback.state_dict()["buffer"], again.state_dict()["buffer"]
    assert states[0]["seen"] == states[1]["seen"]
    assert torch.equal(states[0]["images"], states[1]["images"])


def test_second_fit_fills_anew(lab: Lab, replay: ExperienceMethod) -> None:
    callback = replay.callback()
    for value in (0.2, 0.8):
        callback.dataloader = [(torch.full((4, 1, 6, 6), value), torch.zeros(4, dtype=torch.long))]
        lab.trainer(callback, epochs=1).fit(replay.module(), replay.loader())
        assert set(callback.state_dict()["buffer"]["images"].flatten().tolist()) == {round(255 * value)}


def test_seed_changes_the_draws(lab: Lab, replay: ExperienceMethod) -> None:
    states = []
    for seed in (0, 0, 1):
        module = replay.module()
        lab.trainer(replay.callback(seed=seed), epochs=1).fit(module, replay.loader())
        states.append(module)
    assert lab.distance(states[0], states[1]) == 0
    assert lab.distance(states[0], states[2]) > 0


def test_half_precision_weights(lab: Lab, replay: ExperienceMethod) -> None:
    module = replay.module()
    trainer = lab.trainer(replay.callback(insert_current=True), epochs=1, plugins=[HalfPrecision("bf16-true")])
    trainer.fit(module, replay.loader())
    assert next(module.parameters()).dtype == torch.bfloat16
    assert trainer.callback_metrics["experience_replay/penalty"] > 0


def test_penalty_and_share_are_logged(lab: Lab, replay: ExperienceMethod) -> None:
    """A buffer that is drawn whole, and weights that stand still."""

    class Still(LightningModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = ExperienceReplay(replay.strength, dataloader=replay.old_task())
    trainer = lab.trainer(callback, epochs=1)
    module = replay.module(Still)
    module.net[3].p = 0.0  # type: ignore[index]
    trainer.fit(module, replay.loader())
    state = callback.state_dict()["buffer"]
    penalty = replay.strength * F.cross_entropy(module(state["images"] / 255), state["labels"]).detach()
    images, labels = replay.batches()[-1]
    share = penalty / (penalty + F.cross_entropy(module(images), labels).detach())
    torch.testing.assert_close(trainer.callback_metrics["experience_replay/penalty"], penalty)
    torch.testing.assert_close(trainer.callback_metrics["experience_replay/share"], share)


def test_unsuitable_fits_are_refused(lab: Lab, replay: ExperienceMethod) -> None:
    with pytest.raises(MisconfigurationException, match="`ExperienceReplay` got no sample of the previous task"):
        lab.trainer(replay.callback(dataloader=[])).fit(replay.module(), replay.loader())
    with pytest.raises(MisconfigurationException, match=r"`ExperienceReplay` .* Pass `dataloader=...`"):
        lab.trainer(replay.callback(dataloader=None)).fit(replay.module(), replay.loader())
    with pytest.raises(ValueError, match=r"in \[0, 1\], but .* normalisation out of the data and into the model"):
        lab.trainer(replay.callback(dataloader=[(torch.randn(8, 1, 6, 6), torch.zeros(8).long())])).fit(
            replay.module(), replay.loader()
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
