"""Replay in two processes against one that sees all batches."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.continual.replay_buffer import BufferBatch, ReplayBuffer
from lightning_bd.functional.draws import keyed_generator

SCRIPT = Path(__file__).with_name("ddp_replay.py")
NAMES = ("a-gem", "a-gem accumulated", "replay", "dark", "dark inserting")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddp_replay", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # What an outer Lightning or torchrun run would have set.
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, cwd=Path(__file__).parents[3],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    loaded: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return loaded


def flat(tensors: Any) -> Tensor:  # noqa: ANN401
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("name", NAMES)
def test_buffer_is_a_sample_of_both_shares(results: dict[str, Any], script: ModuleType, name: str) -> None:
    """Once filled, and the same in both processes to the end."""
    buffer, net = results[name]["first"], script.Module().net
    assert results[name]["apart"] == 0
    assert buffer["seen"] == 48
    images, labels = (torch.cat(column) for column in zip(*script.make_batches(2), strict=True))
    rows = [int((images.mul(255).round() == image).all(dim=1).nonzero()) for image in buffer["images"]]
    assert len(set(rows)) == script.CAPACITY
    assert {row >= 36 for row in rows} == {True, False}
    assert torch.equal(buffer["labels"], labels[rows])
    if name.startswith("dark"):
        torch.testing.assert_close(buffer["logits"], net(images[rows]).detach())


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process_by_hand(results: dict[str, Any], script: ModuleType, name: str) -> None:
    """The buffer that was filled is taken over; each process draws its own batch from it."""
    assert set(script.CASES) == set(NAMES)
    net, buffer = script.Module().net, ReplayBuffer(script.CAPACITY)
    accumulate = script.CASES[name][1]
    buffer.load_state_dict(results[name]["first"])
    parameters = list(net.parameters())
    opt = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    batches, projected = script.make_batches(1), []

    def draw(kind: str, *key: int) -> BufferBatch:
        return buffer.sample(script.BATCH_SIZE, keyed_generator(0, kind, *key))

    def term(drawn: BufferBatch) -> Tensor:
        logits = net(drawn.images)
        if drawn.logits is None:
            return torch.as_tensor(script.STRENGTH * F.cross_entropy(logits, drawn.labels))
        distance = ((logits - drawn.logits) ** 2).mean()
        return torch.as_tensor(script.ALPHA * distance + script.BETA * F.cross_entropy(logits, drawn.labels))

    for step, start in enumerate(range(0, 12, 2 * accumulate)):
        losses = []
        for number, (images, labels) in enumerate(batches[start : start + 2 * accumulate]):
            losses.append(F.cross_entropy(net(images), labels))
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
            for images, labels in batches[start : start + 2]:
                buffer.insert(images, labels, net(images).detach())
    for key, value in net.state_dict().items():
        torch.testing.assert_close(results[name]["state"][key], value, rtol=0, atol=2e-6)
    assert results[name]["buffer"]["seen"] == buffer.seen == (48 + 48 * (name == "dark inserting"))
    assert torch.equal(results[name]["buffer"]["images"], buffer.state_dict()["images"])
    assert len(set(projected)) == (2 if name == "a-gem" else len(set(projected)))
    assert any(projected) == name.startswith("a-gem")


def test_values_are_logged(results: dict[str, Any]) -> None:
    assert results["a-gem"]["logged"] == ["a_gem/projected"]
    assert results["replay"]["logged"] == ["experience_replay/penalty", "experience_replay/share"]
