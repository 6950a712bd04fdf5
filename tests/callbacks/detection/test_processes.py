"""Two processes find what one finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_bd.callbacks.detection.processes import gather_over_processes, sum_over_processes

WORKER = Path(__file__).with_name("processes_worker.py")


def test_one_process_has_everything_already() -> None:
    rows = torch.rand(3, 2)
    assert sum_over_processes(rows) is rows
    assert gather_over_processes(rows) is rows


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_fit_and_judge_as_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        done = subprocess.run(
            [sys.executable, str(WORKER), str(tmp_path), str(processes)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for key, value in one["logged"].items():
        assert two["logged"][key] == pytest.approx(value, abs=1e-6), key
    for name, sets in one["scores"].items():
        for each, (index, score) in sets.items():
            found_index, found = two["scores"][name][each]
            order = found_index.argsort()
            if name == "from_mean" and each == "id":
                # The repeated image is among those that the mean is over.
                assert torch.equal(found_index[order], index)
                continue
            assert torch.equal(found_index[order], index)
            torch.testing.assert_close(found[order], score)
