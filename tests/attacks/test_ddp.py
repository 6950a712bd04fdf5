"""Two processes train one trigger."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_bd.triggers import InputAwareTrigger, LIRATrigger, Trigger

WORKER = Path(__file__).with_name("ddp_worker.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lira", "input_aware"])
def test_all_processes_have_the_same_trigger(tmp_path: Path, kind: str) -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PL_GLOBAL_SEED"):
        variables.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), kind], env=variables, cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("trigger", "model"):
        for name, tensor in first[part].items():
            # BatchNorm's statistics are each process' own.
            if "running" not in name:
                assert torch.equal(tensor, second[part][name]), name
    untrained: Trigger = LIRATrigger(0.3, width=4, depth=1) if kind == "lira" else InputAwareTrigger(width=4, depth=1)
    untrained.build((1, 8, 8))
    moved = {name for name, tensor in untrained.state_dict().items() if not torch.equal(tensor, first["trigger"][name])}
    assert moved == set(first["trigger"])
    # The test is about processes that differ.
    assert first["counts"] != second["counts"]
    assert 0 in first["counts"] + second["counts"]
