"""SAM in two processes against two replicas of the net in one."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCRIPT = Path(__file__).with_name("ddp_sam.py")
NAMES = ("sam", "sam accumulated", "m-sam", "m-sam accumulated", "gsam", "looksam")

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


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


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Replicas:
    """Two copies of the net that share weights, each with BatchNorm statistics of its own."""

    def __init__(self, net: nn.Module) -> None:
        self.nets = [net, copy.deepcopy(net)]

    def gradient(self, replica: int, batches: list[tuple[Tensor, Tensor]], perturbation: Tensor | None) -> Tensor:
        """Gradient of one replica's mean loss; the second pass leaves its buffers alone."""
        net = self.nets[replica]
        state = copy.deepcopy(net.state_dict())
        if perturbation is not None:
            vector = flat(list(net.parameters())) + perturbation
            nn.utils.vector_to_parameters(vector, net.parameters())
        net.zero_grad()
        for images, labels in batches:
            (F.cross_entropy(net(images), labels) / len(batches)).backward()  # type: ignore[no-untyped-call]
        gradient = flat([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
        if perturbation is not None:
            net.load_state_dict(state)
        return gradient

    def step(self, update: Tensor, lr: float = 0.1) -> None:
        for net in self.nets:
            nn.utils.vector_to_parameters(flat(list(net.parameters())) - lr * update, net.parameters())


def by_hand(name: str, data: tuple[Tensor, Tensor], net: nn.Module) -> nn.Module:
    accumulate = 2 if "accumulated" in name else 1
    batches = list(zip(*(column.view(12, 4, *column.shape[1:]) for column in data), strict=True))
    replicas, momentum, v = Replicas(net), torch.zeros(()), torch.zeros(())
    for step, start in enumerate(range(0, 6, accumulate)):
        windows = [batches[replica::2][start : start + accumulate] for replica in range(2)]
        # DDP hands the buffers of the first process to the others before a pass that is reduced.
        local = [replicas.gradient(replica, windows[replica], None) for replica in range(2)]
        g = sum(local, torch.zeros(())) / 2
        update = g + 0.7 * g.norm() * v
        if name != "looksam" or step % 2 == 0:
            sources = local if name.startswith("m-sam") else [g, g]
            perturbations = [0.2 * source / source.norm() for source in sources]
            s = sum((replicas.gradient(r, windows[r], perturbations[r]) for r in range(2)), torch.zeros(())) / 2
            update = s
            if name == "gsam":
                update = s - 0.3 * (g - (g @ s) / (s @ s) * s)
            v = s - (g @ s) / (g @ g) * g
            v = v / v.norm()
        momentum = 0.9 * momentum + update
        replicas.step(momentum)
    return replicas.nets[0]


@pytest.mark.parametrize("name", NAMES)
def test_equals_two_replicas_by_hand(results: dict[str, Any], name: str) -> None:
    spec = importlib.util.spec_from_file_location("ddp_sam", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set(script.CASES) == set(NAMES)
    expected = by_hand(name, script.make_data(), script.Module().net)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(results[name]["state"][key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_all_processes_hold_the_same_weights_and_direction(results: dict[str, Any], name: str) -> None:
    assert results[name]["apart"] == 0
    assert results[name]["direction"] == (6 if name == "looksam" else 0)
