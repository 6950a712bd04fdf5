"""Anchoring and distillation in two processes against one that sees all batches."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.batch import Sample

SCRIPT = Path(__file__).with_name("ddp_loss_terms.py")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddp_loss_terms", SCRIPT)
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


def total_loss(net: nn.Module, anchor: nn.Module, batch: Sample, strength: float) -> Tensor:
    logits, old = net(batch.image), anchor(batch.image).detach()
    clean = ~batch.is_poisoned
    distances = (logits.softmax(1) - old.softmax(1)).square().sum(1)[clean]
    divergence = F.kl_div((logits / 2).log_softmax(1), (old / 2).softmax(1), reduction="batchmean") * 4
    terms: Tensor = distances.sum() / max(len(distances), 1) + divergence
    return F.cross_entropy(logits, batch.label) + strength * terms


@pytest.mark.parametrize("name", ["plain", "called again", "with SAM"])
def test_equals_one_process_by_hand(results: dict[str, Any], script: ModuleType, name: str) -> None:
    _, accumulate, rho, _ = script.CASES[name]
    net = script.Module().net
    anchor = copy.deepcopy(net)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    batches = script.make_batches()
    size = 2 * accumulate

    def backward(window: list[Sample]) -> None:
        opt.zero_grad()
        torch.stack([total_loss(net, anchor, batch, script.STRENGTH) for batch in window]).mean().backward()  # type: ignore[no-untyped-call]

    for window in (batches[start : start + size] for start in range(0, len(batches), size)):
        backward(window)
        if rho:
            gradients = [p.grad for p in net.parameters()]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            weights = [p.detach().clone() for p in net.parameters()]
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    p.add_(rho * g / norm)
            backward(window)
            with torch.no_grad():
                for p, before in zip(net.parameters(), weights, strict=True):
                    p.copy_(before)
        opt.step()
    result = results[name]
    assert result["apart"] == 0
    for key, value in net.state_dict().items():
        torch.testing.assert_close(result["state"][key], value, rtol=0, atol=1e-6)
    # Six batches; SAM sees each twice. Both terms share one call, be it the step's or their own.
    assert result["calls"] == 6 * (2 if rho else 1)
