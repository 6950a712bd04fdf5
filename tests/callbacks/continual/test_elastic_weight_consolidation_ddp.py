"""EWC, MAS and SI in two processes against one that sees all batches."""

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

from lightning_bd.functional.fisher import fisher_diagonal
from lightning_bd.functional.memory_aware import memory_aware_importance

SCRIPT = Path(__file__).with_name("ddp_ewc.py")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddp_ewc", SCRIPT)
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


@pytest.mark.parametrize("name", ["plain", "accumulated", "unused parameters"])
def test_equals_one_process_by_hand(results: dict[str, Any], script: ModuleType, name: str) -> None:
    accumulate, num_samples, _ = script.CASES[name]
    net = script.Module().net
    reference = script.make_batches(2)
    if num_samples is not None:  # seven: four from the first process, three from the second
        reference = [(x[:size], y[:size]) for (x, y), size in zip(reference, (4, 3), strict=False)]
    fisher = fisher_diagonal(net, reference)
    anchor = {key: p.detach().clone() for key, p in net.named_parameters()}
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    batches = script.make_batches(1)
    size = 2 * accumulate
    for window in (batches[start : start + size] for start in range(0, len(batches), size)):
        terms = [(fisher[key] * (p - anchor[key]) ** 2).sum() for key, p in net.named_parameters()]
        loss = torch.stack([F.cross_entropy(net(x), y) for x, y in window]).mean()
        opt.zero_grad()
        (loss + script.STRENGTH * torch.stack(terms).sum()).backward()
        opt.step()
    result = results[name]
    assert result["apart"] == 0
    for key, value in fisher.items():
        torch.testing.assert_close(result["fisher"][f"net.{key}"], value)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(result["state"][key], value, rtol=0, atol=1e-6)
    terms = [(fisher[key] * (p - anchor[key]) ** 2).sum() for key, p in net.named_parameters()]
    torch.testing.assert_close(result["penalty"], script.STRENGTH * torch.stack(terms).sum().detach())


@pytest.mark.parametrize("name", ["mas", "si"])
def test_others_equal_one_process_by_hand(results: dict[str, Any], script: ModuleType, name: str) -> None:
    strength, seeds = script.OTHERS[name]
    net = script.Module().net
    names = [key for key, _ in net.named_parameters()]
    importance: dict[str, Tensor] = {key: torch.zeros_like(p) for key, p in net.named_parameters()}
    if name == "mas":
        importance = memory_aware_importance(net, script.make_batches(2))
    for seed in seeds:
        anchor = {key: p.detach().clone() for key, p in net.named_parameters()}
        path = {key: torch.zeros_like(p) for key, p in net.named_parameters()}
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        batches = script.make_batches(seed)
        for window in (batches[start : start + 4] for start in range(0, len(batches), 4)):
            loss = torch.stack([F.cross_entropy(net(x), y) for x, y in window]).mean()
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
    result = results[name]
    assert result["apart"] == 0
    for key, value in net.state_dict().items():
        torch.testing.assert_close(result["state"][key], value, rtol=0, atol=1e-6)
    for key, value in importance.items():
        torch.testing.assert_close(result["carried"][f"net.{key}"], value, rtol=1e-4, atol=1e-7)
