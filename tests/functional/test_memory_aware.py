"""The sensitivity of the output against its definition, one sample at a time."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.functional.memory_aware import memory_aware_importance, memory_aware_sums

Batches = list[tuple[Tensor, ...]]


def definition(model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in samples:
        norm = model(x[None].clone()).norm() ** 2
        gradients = torch.autograd.grad(norm, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.abs()
    return {name: total / len(samples) for name, total in sums.items()}


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.PReLU(),
        nn.Linear(5, 3),
    ).double()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.3, 2.0)
    return model


class Branching(nn.Module):
    """Uses its layer a number of times that depends on the data, which vmap cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen: Tensor
        self.seen += 1
        for _ in range(1 + int(x.sum() > 0)):
            x = self.layer(x)
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(x).tanh())
        return logits


def images(count: int = 7) -> Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def vectors() -> Tensor:
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("chunk_size", "max_memory"), [(None, None), (1, None), (3, None), (5, 3000), (None, 1)])
@pytest.mark.parametrize("kind", [cnn, Branching, Tied])
def test_equals_the_definition(kind: type[nn.Module], chunk_size: int | None, max_memory: int | None) -> None:
    model, samples = kind(), images() if kind is cnn else vectors()
    expected = definition(kind().eval(), samples)
    batches: Batches = [(samples[:4],), (samples[4:],)]
    actual = memory_aware_importance(model, batches, chunk_size=chunk_size, max_memory=max_memory)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)


def test_signs_do_not_cancel() -> None:
    """What the gradient of the batch's mean would give is less."""
    model, samples = cnn().eval(), images()
    norm = model(samples).square().sum(1).mean()
    shortcut = torch.autograd.grad(norm, model[0].weight)[0].abs()  # type: ignore[index]
    importance = memory_aware_importance(model, [(samples,)])["0.weight"]
    assert (shortcut <= importance + 1e-9).all()
    assert shortcut.sum() < 0.9 * importance.sum()


def test_labels_are_not_looked_at() -> None:
    model, samples = cnn(), images()
    first = memory_aware_importance(model, [(samples, torch.zeros(7))])
    second = memory_aware_importance(model, [(samples, "no label")])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_number_of_samples() -> None:
    batches: Batches = [(images()[:4],), (images()[4:],)]
    sums, count = memory_aware_sums(cnn(), batches, num_samples=5)
    assert count == 5
    for name, value in definition(cnn().eval(), images()[:5]).items():
        torch.testing.assert_close(sums[name] / 5, value)
    sums, count = memory_aware_sums(cnn(), batches, num_samples=0)
    assert count == 0
    assert all(not total.any() for total in sums.values())


def test_half_precision_is_summed_in_float32() -> None:
    model = nn.Linear(3, 2).half()
    with torch.no_grad():
        model.weight.fill_(100.0)
        model.bias.zero_()
    # An output of 300 squared is beyond float16's range.
    importance = memory_aware_importance(model, [(torch.ones(2, 3).half(),)])
    assert importance["weight"].dtype == torch.float32
    assert importance["weight"].tolist() == [[600.0] * 3] * 2


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [cnn, Branching])
def test_leaves_no_trace(make: type[nn.Module], fails: bool) -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * torch.rand(())

    model = nn.Sequential(Draws(), make())
    model[1].train()
    model[0].eval()
    samples = images() if make is cnn else vectors()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    broken = torch.ones(2, 1, 1, dtype=torch.float64)
    stream = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(RuntimeError, match=r"shape|dimension|size"):
            memory_aware_sums(model, [(samples,), (broken,)])
    else:
        memory_aware_sums(model, [(samples,)])
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_says_why_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_bd"):
        memory_aware_sums(Branching(), [(vectors(),), (vectors(),)])
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "Per-sample gradients in a loop over the samples, as torch.func.vmap fails"
    ]


def test_autocast_does_not_reach_it() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = memory_aware_importance(model, [(x,)])
    with torch.autocast("cpu", torch.bfloat16):
        actual = memory_aware_importance(model, [(x,)])
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_works_without_gradients_outside() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        importance = memory_aware_importance(model, [(x,)])
    expected = (2 * F.linear(x, model.weight, model.bias)).abs().mean(0).detach()
    torch.testing.assert_close(importance["bias"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": -1}, "`num_samples` to be a non-negative integer or None, but got -1"),
        ({"chunk_size": 0}, "`chunk_size` to be a positive integer or None, but got 0"),
        ({"max_memory": 0}, "`max_memory` to be a positive integer or None, but got 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_aware_sums(cnn(), [], **arguments)


def test_no_sample_and_mixed_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, but got none"):
        memory_aware_importance(cnn(), [])
    with pytest.raises(ValueError, match="layer '1' has no running statistics and mixes the batch"):
        memory_aware_importance(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), [])
