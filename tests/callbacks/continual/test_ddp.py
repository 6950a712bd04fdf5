"""Every method in two processes against one that sees all batches."""

import copy
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.batch import Sample
from lightning_bd.callbacks.continual.replay_buffer import BufferBatch, ReplayBuffer
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.fisher import fisher_diagonal
from lightning_bd.functional.memory_aware import memory_aware_importance

REPLAYS = ("a-gem", "a-gem accumulated", "replay", "dark", "dark inserting")
TERMS = ("terms", "terms, called again", "terms with SAM")
CONSOLIDATIONS = ("ewc", "ewc accumulated", "ewc, unused parameters")

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def flat(tensors: Any) -> Tensor:  # noqa: ANN401
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def windows(script: ModuleType, name: str, seed: int = 1) -> Iterator[list[Sample]]:
    """The batches that both processes step on."""
    batches, size = script.make_batches(seed), 2 * script.CASES[name].accumulate
    return (batches[start : start + size] for start in range(0, len(batches), size))


def replica(script: ModuleType, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    net: nn.Module = script.Module().net
    return net, torch.optim.SGD(net.parameters(), lr=script.CASES[name].lr, momentum=0.9)


def check(result: dict[str, Any], net: nn.Module, atol: float = 1e-6) -> None:
    assert result["apart"] == 0
    for key, value in net.state_dict().items():
        torch.testing.assert_close(result["state"][key], value, rtol=0, atol=atol)


def test_all_cases_are_checked(ddp_script: ModuleType) -> None:
    assert set(ddp_script.CASES) == {*REPLAYS, *TERMS, *CONSOLIDATIONS, "mas", "si"}


@pytest.mark.parametrize("name", CONSOLIDATIONS)
def test_consolidation(ddp_results: dict[str, Any], ddp_script: ModuleType, name: str) -> None:
    net, opt = replica(ddp_script, name)
    reference = [batch[:2] for batch in ddp_script.make_batches(2)]
    if ddp_script.CASES[name].num_samples is not None:  # seven: four from the first process, three from the second
        (x, y), (others, theirs) = reference[0], reference[9]
        reference = [(x, y), (others[:3], theirs[:3])]
    fisher = fisher_diagonal(net, reference)
    anchor = {key: p.detach().clone() for key, p in net.named_parameters()}

    def penalty() -> Tensor:
        terms = [(fisher[key] * (p - anchor[key]) ** 2).sum() for key, p in net.named_parameters()]
        return torch.as_tensor(ddp_script.EWC * torch.stack(terms).sum())

    for window in windows(ddp_script, name):
        loss = torch.stack([F.cross_entropy(net(x), y) for x, y, *_ in window]).mean() + penalty()
        opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
    result = ddp_results[name]
    check(result, net)
    for key, value in fisher.items():
        torch.testing.assert_close(result["memory"][f"net.{key}"], value)
    torch.testing.assert_close(result["logged"]["ewc/penalty"], penalty().detach())


@pytest.mark.parametrize("name", ["mas", "si"])
def test_synapses(ddp_results: dict[str, Any], ddp_script: ModuleType, name: str) -> None:
    net, _ = replica(ddp_script, name)
    names = [key for key, _ in net.named_parameters()]
    importance: dict[str, Tensor] = {key: torch.zeros_like(p) for key, p in net.named_parameters()}
    if name == "mas":
        importance = memory_aware_importance(net, [batch[:2] for batch in ddp_script.make_batches(2)])
    strength = ddp_script.MAS if name == "mas" else ddp_script.SI
    for seed in ddp_script.CASES[name].seeds:
        anchor = {key: p.detach().clone() for key, p in net.named_parameters()}
        path = {key: torch.zeros_like(p) for key, p in net.named_parameters()}
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for window in windows(ddp_script, name, seed):
            loss = torch.stack([F.cross_entropy(net(x), y) for x, y, *_ in window]).mean()
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            before = [p.detach().clone() for p in net.parameters()]
            for key, p, gradient in zip(names, net.parameters(), gradients, strict=True):
                p.grad = gradient + 2 * strength * importance[key] * (p.detach() - anchor[key])
            opt.step()
            for key, p, gradient, old in zip(names, net.parameters(), gradients, before, strict=True):
                path[key] -= gradient * (p.detach() - old)
        if name == "si":
            for key, p in net.named_parameters():
                moved = p.detach() - anchor[key]
                importance[key] = importance[key] + path[key].clamp(min=0) / (moved**2 + 0.1)
    check(ddp_results[name], net)
    for key, value in importance.items():
        torch.testing.assert_close(ddp_results[name]["memory"][f"net.{key}"], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", TERMS)
def test_anchoring_and_distillation(ddp_results: dict[str, Any], ddp_script: ModuleType, name: str) -> None:
    net, opt = replica(ddp_script, name)
    anchor, rho = copy.deepcopy(net), ddp_script.CASES[name].rho

    def loss_of(batch: Sample) -> Tensor:
        logits, old = net(batch.image), anchor(batch.image).detach()
        distances = (logits.softmax(1) - old.softmax(1)).square().sum(1)[~batch.is_poisoned]
        divergence = F.kl_div((logits / 2).log_softmax(1), (old / 2).softmax(1), reduction="batchmean") * 4
        terms = distances.sum() / max(len(distances), 1) + divergence
        return torch.as_tensor(F.cross_entropy(logits, batch.label) + ddp_script.TERMS * terms)

    def backward(window: list[Sample]) -> None:
        opt.zero_grad()
        torch.stack([loss_of(batch) for batch in window]).mean().backward()  # type: ignore[no-untyped-call]

    for window in windows(ddp_script, name):
        backward(window)
        if rho:
            weights, gradient = flat(net.parameters()), flat(p.grad for p in net.parameters())
            nn.utils.vector_to_parameters(weights + rho * gradient / gradient.norm(), net.parameters())
            backward(window)
            nn.utils.vector_to_parameters(weights, net.parameters())
        opt.step()
    check(ddp_results[name], net)
    # Six batches; SAM sees each twice. Both terms share one call, be it the step's or their own.
    assert ddp_results[name]["calls"] == 6 * (2 if rho else 1)


@pytest.mark.parametrize("name", REPLAYS)
def test_buffer_is_a_sample_of_both_shares(ddp_results: dict[str, Any], ddp_script: ModuleType, name: str) -> None:
    """Once filled, and the same in both processes to the end."""
    buffer, net = ddp_results[name]["start"], ddp_script.Module().net
    assert ddp_results[name]["apart"] == 0
    assert buffer["seen"] == 48
    batches = ddp_script.make_batches(2)
    images, labels = torch.cat([batch.image for batch in batches]), torch.cat([batch.label for batch in batches])
    rows = [int((images.mul(255).round() == image).all(dim=1).nonzero()) for image in buffer["images"]]
    assert len(set(rows)) == ddp_script.CAPACITY
    assert {row >= 36 for row in rows} == {True, False}
    assert torch.equal(buffer["labels"], labels[rows])
    if name.startswith("dark"):
        torch.testing.assert_close(buffer["logits"], net(images[rows]).detach())


@pytest.mark.parametrize("name", REPLAYS)
def test_replay(ddp_results: dict[str, Any], ddp_script: ModuleType, name: str) -> None:
    """The buffer that was filled is taken over; each process draws its own batch from it."""
    net, opt = replica(ddp_script, name)
    buffer, result, projected = ReplayBuffer(ddp_script.CAPACITY), ddp_results[name], []
    buffer.load_state_dict(result["start"])
    parameters = list(net.parameters())

    def draw(kind: str, *key: int) -> BufferBatch:
        return buffer.sample(ddp_script.BATCH_SIZE, keyed_generator(0, kind, *key))

    def term(drawn: BufferBatch) -> Tensor:
        logits = net(drawn.images)
        loss = F.cross_entropy(logits, drawn.labels)
        if drawn.logits is None:
            return torch.as_tensor(ddp_script.REPLAY * loss)
        return torch.as_tensor(ddp_script.ALPHA * ((logits - drawn.logits) ** 2).mean() + ddp_script.BETA * loss)

    for step, window in enumerate(windows(ddp_script, name)):
        losses = []
        for number, batch in enumerate(window):
            losses.append(F.cross_entropy(net(batch.image), batch.label))
            if not name.startswith("a-gem"):
                losses[-1] = losses[-1] + term(draw("experience_replay", step, number // 2, number % 2))
        opt.zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        if name.startswith("a-gem"):
            g, drawn = flat(p.grad for p in parameters), [draw("a_gem", step, rank) for rank in range(2)]
            loss = torch.stack([F.cross_entropy(net(batch.images), batch.labels) for batch in drawn]).mean()
            r = flat(torch.autograd.grad(loss, parameters))
            projected.append(bool(g @ r < 0))
            g = g - (g @ r) / (r @ r) * r if projected[-1] else g
            for p, part in zip(parameters, torch.split(g, [p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p).clone()
        opt.step()
        if name == "dark inserting":
            for batch in window:
                buffer.insert(batch.image, batch.label, net(batch.image).detach())
    check(result, net, atol=2e-6)
    assert result["memory"]["seen"] == buffer.seen == (48 + 48 * (name == "dark inserting"))
    assert torch.equal(result["memory"]["images"], buffer.state_dict()["images"])
    assert len(set(projected)) == (2 if name == "a-gem" else len(set(projected)))
    assert any(projected) == name.startswith("a-gem")


def test_values_are_logged(ddp_results: dict[str, Any]) -> None:
    assert set(ddp_results["a-gem"]["logged"]) == {"a_gem/projected"}
    assert set(ddp_results["replay"]["logged"]) == {"experience_replay/penalty", "experience_replay/share"}
