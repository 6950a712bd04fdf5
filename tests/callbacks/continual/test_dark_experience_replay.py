"""Dark experience replay through a Trainer against a loop written by hand; the module knows nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_bd.callbacks.continual.dark_experience_replay import DarkExperienceReplay
from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay

if TYPE_CHECKING:
    from tests.callbacks.conftest import Lab
    from tests.callbacks.continual.conftest import DarkExperienceMethod

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


@pytest.mark.parametrize("bf16", [False, True])
def test_current_samples_may_be_offered_with_the_logits_after_their_step(
    lab: Lab,
    dark: DarkExperienceMethod,
    bf16: bool,
) -> None:
    module, callback = dark.module(), dark.callback(insert_current=True)
    settings = lab.settings(bf16=bf16)
    lab.trainer(callback, settings=settings).fit(module, dark.loader())
    lab.assert_equal_states(module.net, dark.by_hand(settings, insert_current=True).net, dark.atol)
    assert lab.distance(module.net, dark.by_hand(settings).net) > 1e-3


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_logits_are_those_of_the_model_that_comes_in(lab: Lab, dark: DarkExperienceMethod) -> None:
    """In evaluation mode, also where the fit has put some layers there; all are back in their modes afterwards."""

    class SeesModes(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.modes = [part.training for part in pl_module.modules()]

    module, callback, sees = dark.module(), DarkExperienceReplay(dataloader=dark.old_task()), SeesModes()
    module.get_submodule("net.3").eval()
    expected = [part.training for part in module.modules()]
    lab.trainer(callback, sees, epochs=1).fit(module, dark.loader())
    assert sees.modes == expected
    state = callback.state_dict()["buffer"]
    assert len(state["labels"]) == 40
    assert state["logits"].dtype == torch.float32
    before = lab.net().eval()
    for (images, labels), start in zip(dark.old_task(), range(0, 40, 8), strict=True):
        assert torch.equal(state["labels"][start : start + 8], labels)
        torch.testing.assert_close(state["logits"][start : start + 8], before(images))


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.0), (0.0, 0.3)])
def test_either_term_alone(lab: Lab, dark: DarkExperienceMethod, alpha: float, beta: float) -> None:
    """DER has no labels; without the logits it is experience replay, bit for bit."""
    module = dark.module()
    lab.trainer(dark.callback(alpha, beta)).fit(module, dark.loader())
    lab.assert_equal_states(module.net, dark.by_hand(alpha=alpha, beta=beta).net, dark.atol)
    if alpha == 0:
        other = dark.module()
        lab.trainer(ExperienceReplay(beta, dark.capacity, dark.batch_size, dark.old_task())).fit(other, dark.loader())
        assert lab.distance(module, other) == 0


def test_modes_are_put_back_after_an_exception(lab: Lab, dark: DarkExperienceMethod) -> None:
    class Fails(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("broken")

    module = dark.module(Fails)
    with pytest.raises(OSError, match="broken"):
        lab.trainer(dark.callback()).fit(module, dark.loader())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("insert_current", [False, True])
def test_resume_goes_on_with_the_buffer(
    lab: Lab, dark: DarkExperienceMethod, tmp_path: Path, insert_current: bool
) -> None:
    whole, resumed, path = dark.module(), dark.module(), tmp_path / "first.ckpt"
    callback = dark.callback(insert_current=insert_current)
    again = dark.callback(dataloader=None, insert_current=insert_current)  # filling again would fail
    lab.trainer(callback, lab.saves_first_epoch(path)).fit(whole, dark.loader())
    lab.trainer(again).fit(resumed, dark.loader(), ckpt_path=path, weights_only=True)
    lab.assert_equal_states(resumed.net, whole.net, atol=0)
    states = callback.state_dict()["buffer"], again.state_dict()["buffer"]
    assert torch.equal(states[0]["logits"], states[1]["logits"])


def test_penalty_is_logged_under_its_name(lab: Lab, dark: DarkExperienceMethod) -> None:
    trainer = lab.trainer(dark.callback(), epochs=1)
    trainer.fit(dark.module(), dark.loader())
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
