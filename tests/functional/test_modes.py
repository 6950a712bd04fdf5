"""Training and evaluation mode, put back."""

import pytest
from torch import nn

from lightning_bd.functional.modes import mode


@pytest.mark.parametrize("training", [True, False])
def test_each_layer_gets_its_own_mode_back(training: bool) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout().eval(), nn.Sequential(nn.BatchNorm1d(1)).eval())
    before = [module.training for module in model.modules()]

    def fail() -> None:
        with mode(model, training=training):
            assert all(module.training == training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == before
