"""Loss and accuracy against all images at once, and weights that are not finite."""

import copy
import math
from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_bd.functional.evaluation import check_finite_weights, evaluate

Batches = list[tuple[Tensor, Tensor]]


def make_net(seed: int = 0) -> nn.Sequential:
    """Weights and running statistics of their own; one layer in a mode of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
        )
        for parameter in net[1].parameters():
            nn.init.normal_(parameter, 1.0)
        for _ in range(seed + 1):
            net(torch.rand(8, 1, 6, 6))
    net[2].eval()
    return net


def make_batches(sizes: tuple[int, ...] = (8, 3), seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [module.training for module in model.modules()]


def assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], list[bool]]) -> None:
    state, modes = snapshot(model)
    assert modes == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def expected(model: nn.Module, weights: Mapping[str, Tensor], batches: Batches) -> tuple[float, float]:
    """Loss and accuracy of a copy with these weights, all images at once."""
    model = copy.deepcopy(model).eval()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = functional_call(model, dict(weights), (images,)).detach()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


class Explodes(Batches):
    """Batches of which the second raises."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield make_batches()[0]
        raise RuntimeError("no more")


def test_evaluate_counts_every_image_the_same() -> None:
    model, batches = make_net(), make_batches()
    before = snapshot(model)
    result = evaluate(model, batches)
    assert result == pytest.approx(expected(model, {}, batches), rel=1e-6)
    assert (result.loss, result.accuracy) == tuple(result)
    assert_untouched(model, before)
    mean_of_means = sum(evaluate(model, [batch]).loss for batch in batches) / 2
    assert result.loss != pytest.approx(mean_of_means, rel=1e-3)


def test_evaluate_takes_longer_tuples_and_iterators() -> None:
    batches = make_batches()
    longer = ((images, labels, labels * 0) for images, labels in batches)
    assert evaluate(make_net(), longer) == evaluate(make_net(), batches)


def test_a_network_that_overflows_does_not_obey_the_attacker() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [2.0, 1.0]])
    loss, accuracy = evaluate(nn.Identity(), [(logits, torch.zeros(3, dtype=torch.long))])
    assert math.isnan(loss)
    # The NaN is wrong; the infinite one is the maximum.
    assert accuracy == pytest.approx(2 / 3)


def test_half_precision_logits_are_averaged_in_full() -> None:
    logits = torch.tensor([[3.0, 0.0]] * 3000, dtype=torch.bfloat16)
    loss, _ = evaluate(nn.Identity(), [(logits, torch.zeros(3000, dtype=torch.long))])
    assert loss == pytest.approx(F.cross_entropy(logits[:1].double(), torch.tensor([0])).item(), rel=1e-5)


def test_evaluate_without_images_and_after_an_exception() -> None:
    model = make_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="`batches` to hold at least one image, but got none"):
        evaluate(model, [])
    with pytest.raises(RuntimeError, match="no more"):
        evaluate(model, Explodes())
    assert_untouched(model, before)


def test_weights_that_are_not_finite_are_named() -> None:
    model = make_net()
    check_finite_weights(model)
    model.register_buffer("mask", torch.tensor(float("-inf")))
    check_finite_weights(model)
    model.state_dict()["1.running_var"][2] = float("inf")
    with pytest.raises(ValueError, match=r"^The model has weights that are not finite: `1.running_var`; training has"):
        check_finite_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = float("nan")
    names = "`0.weight`, `0.bias`, `1.weight` and 4 more"
    with pytest.raises(ValueError, match=f"^a.ckpt has weights that are not finite: {names}; .* earlier checkpoint"):
        check_finite_weights(model, "a.ckpt")
