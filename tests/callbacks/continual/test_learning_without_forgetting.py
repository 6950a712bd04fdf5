"""Learning without forgetting through a Trainer against loops written by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from lightning_bd.callbacks.continual.anchoring import Anchoring
from lightning_bd.callbacks.continual.learning_without_forgetting import LearningWithoutForgetting

if TYPE_CHECKING:
    from tests.callbacks.conftest import Lab
    from tests.callbacks.continual.conftest import DistillationMethod

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_penalty_is_logged(lab: Lab, lwf: DistillationMethod, accumulate: int) -> None:
    trainer = lab.trainer(lwf.callback(), accumulate=accumulate)
    trainer.fit(lwf.module(), lwf.loader())
    penalties = lwf.by_hand(lab.settings(accumulate=accumulate)).notes
    assert float(trainer.callback_metrics["lwf/penalty"]) == pytest.approx(penalties[-1], rel=1e-4)


def test_beside_another_term(lab: Lab, lwf: DistillationMethod) -> None:
    """Each takes the logits of the same step and its own anchor."""
    module, other = lwf.module(), lwf.module()
    callbacks = [lwf.callback(), Anchoring(strength=1e-30)]
    lab.trainer(*callbacks).fit(module, lwf.loader())
    lab.trainer(*callbacks[::-1]).fit(other, lwf.loader())
    lab.assert_equal_states(module.net, lwf.by_hand().net)
    lab.assert_equal_states(module.net, other.net, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"`temperature` to be a positive float, but got {temperature}"):
        LearningWithoutForgetting(temperature=temperature)


def test_strength_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`strength` to be a non-negative float, but got -1\.0"):
        LearningWithoutForgetting(strength=-1.0)
