"""Which layers follow each other, from what a forward pass does."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.callbacks.defense.layers import normalized_convolutions


class Adds(nn.Module):
    """A convolution, a shortcut added to its output, and a normalisation."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.inplace = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), inplace

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        if self.inplace:
            out += x
        else:
            out = out + x
        normalised: Tensor = self.bn(out)
        return normalised


@pytest.mark.parametrize(
    "model",
    [
        Adds(inplace=True),
        Adds(inplace=False),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(2)),
    ],
    ids=["in place", "out of place", "relu"],
)
def test_what_is_changed_between_is_no_pair(model: nn.Module) -> None:
    assert normalized_convolutions(model, torch.rand(1, 2, 4, 4)) == {}


def test_pairs_are_found_where_tensors_have_no_version() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
    with torch.inference_mode():
        assert normalized_convolutions(model, torch.rand(1, 2, 4, 4)) == {"0": (model[0], model[1])}
