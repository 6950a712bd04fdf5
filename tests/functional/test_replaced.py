"""Calling a module with other tensors, in modules that hold a layer twice or share a parameter."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.functional.fisher import fisher_diagonal
from lightning_bd.functional.memory_aware import memory_aware_importance
from lightning_bd.functional.replaced import call_with


class Net(nn.Module):
    """Its layers, two of which share a weight; the last one has no rule, so that squares need `vmap`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.PReLU()).double().eval()
        self.net[2].weight = self.net[0].weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


class Aliased(Net):
    """The same, with second names for layers and for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.all = self.net[0], self.net[1], self.net


def tensors(model: nn.Module) -> list[Tensor]:
    """Every place's, under all its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [tensor for _, tensor in named]


def assert_own(model: nn.Module, before: list[Tensor]) -> None:
    after = tensors(model)
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(after, before, strict=True))


def samples() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [Net, Aliased])
def test_all_tensors_are_replaced_and_put_back(kind: type[Net]) -> None:
    model = kind()
    before, values = tensors(model), copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.copy_(torch.rand(tensor.shape))
    replacements = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert "net.2.weight" not in replacements
    torch.testing.assert_close(call_with(model, replacements, samples()), other(samples()), rtol=0, atol=0)
    assert_own(model, before)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_with(model, replacements, torch.ones(2, 3, dtype=torch.float64))
    assert_own(model, before)
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())


def test_a_tied_parameter_may_be_named_anywhere() -> None:
    model, zeros = Aliased(), torch.zeros(4, 4, dtype=torch.float64)
    outputs = [call_with(model, {f"net.{index}.weight": zeros}, samples()) for index in (0, 2)]
    assert torch.equal(*outputs)
    expected = model.net[3](model.net[2].bias).detach().expand(5, 4)
    torch.testing.assert_close(outputs[0].detach(), expected)


def test_what_is_not_named_stays() -> None:
    model = Aliased()
    with torch.no_grad():
        assert torch.equal(call_with(model, {}, samples()), model(samples()))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"to name parameters and buffers of `Net`, but got \['a', 'net.9.weight'\]"):
        call_with(Net(), {"net.9.weight": torch.ones(1), "a": torch.ones(1)}, samples())


@pytest.mark.parametrize("measure", [memory_aware_importance, fisher_diagonal])
def test_importance_of_a_model_with_second_names(measure: object) -> None:
    assert callable(measure)
    model, labels = Aliased(), torch.arange(5) % 4
    before, expected = tensors(model), measure(Net(), [(samples(), labels)])
    actual = measure(model, [(samples(), labels)])
    assert_own(model, before)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=0)
