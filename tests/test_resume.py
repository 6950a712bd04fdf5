"""A run that is killed anywhere and continued by the same command ends as if it had not been cut, bit for bit."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

WORKER = Path(__file__).with_name("resume_worker.py")
ROOT = Path(__file__).parents[1]

Job = dict[str, Any]
STREAMING: Job = {"in_memory": False, "workers": 2}

#: Files that a run writes, in order of their first appearance, and how often.
WRITES = {
    "run.json": 1,
    "init.ckpt": 1,
    "phase.json": 3,
    "last.ckpt": 7,
    "final.ckpt": 3,
    "result.json": 3,
    "results.csv": 3,
}
SOME_WRITES = [
    ("init.ckpt", 0, False), ("last.ckpt", 1, False), ("last.ckpt", 2, True), ("final.ckpt", 0, True),
    ("final.ckpt", 2, False), ("result.json", 1, True), ("results.csv", 2, False),
]  # fmt: skip
ALL_WRITES = [
    (name, number, after) for name, count in WRITES.items() for number in range(count) for after in (False, True)
]
BATCHES = [("inject", 0, 0), ("inject", 2, 5), ("clean", 1, 0), ("defend", 1, 1)]


def environment() -> dict[str, str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # What an outer Lightning or torchrun run, or `seed_everything`, would have set.
    for name in (
        "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PL_GLOBAL_SEED",
    ):  # fmt: skip
        variables.pop(name, None)
    return variables


def call(*command: str, folder: Path = ROOT, expected: int = 0) -> str:
    """Run a command in a process group of its own, which may be killed as a whole; return its error output."""
    done = subprocess.run(
        [sys.executable, *command], env=environment(), cwd=folder, capture_output=True, text=True, timeout=300,
        check=False, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr


def do(folder: Path, jobs: list[Job]) -> list[int]:
    call(str(WORKER), str(folder), json.dumps(jobs))
    statuses: list[int] = json.loads((folder / "statuses.json").read_text())
    return statuses


def cut_and_continued(name: str, before: Job, after: Job | None = None) -> list[Job]:
    return [{"run": name, **before}, {"run": name, **(after or {})}]


def outcome(run: Path) -> tuple[dict[str, dict[str, torch.Tensor]], list[dict[str, str]]]:
    """Final weights of each phase, and the results without the seconds."""
    finals = {
        str(path.parent.name): torch.load(path, weights_only=True)["state_dict"]
        for path in sorted(run.glob("*/final.ckpt"))
    }
    with (run / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return finals, rows


def equal(one: Path, other: Path) -> bool:
    (finals, rows), (other_finals, other_rows) = outcome(one), outcome(other)
    assert finals.keys() == other_finals.keys()
    assert len(finals) == len(rows) == len(other_rows)
    return rows == other_rows and all(
        torch.equal(tensor, other_finals[phase][name])
        for phase, state in finals.items()
        for name, tensor in state.items()
    )


def label(*place: object) -> str:
    return "-".join(str(part) for part in place)


def label_of(job: Job) -> str:
    return label(*(job["batch"] if "batch" in job else job["write"]))


def check(folder: Path, name: str) -> None:
    """Compare a run that was cut and continued with the one that was not."""
    assert equal(folder / "uncut", folder / name)
    left = [path.name for path in (folder / name).glob("*/*") if path.name.startswith(".final") or path.suffix == ""]
    assert left == []


SOME = [
    *[cut_and_continued(label(*place), {"batch": place}) for place in BATCHES],
    *[cut_and_continued(label(*place), {"write": place}) for place in SOME_WRITES],
    cut_and_continued("streamed", {"batch": ("inject", 1, 3), **STREAMING}, STREAMING),
    # Where images are read from may change in between.
    cut_and_continued("streamed-then-in-memory", {"batch": ("clean", 1, 1), **STREAMING}),
    # Without a seed of its own per batch.
    [{"run": "uncut-unseeded", "unseeded": True}],
    cut_and_continued("unseeded", {"batch": ("inject", 1, 0), "unseeded": True}, {"unseeded": True}),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Do all jobs, each in a process of its own; return the folder of the runs and the exit statuses per run."""
    folder = tmp_path_factory.mktemp("one")
    jobs = [{"run": "uncut"}, *(job for pair in SOME for job in pair)]
    statuses: dict[str, list[int]] = {}
    for job, status in zip(jobs, do(folder, jobs), strict=True):
        statuses.setdefault(job["run"], []).append(status)
    return folder, statuses


@pytest.mark.slow
@pytest.mark.parametrize("name", [pair[0]["run"] for pair in SOME[:-2]])
def test_one_process(one_process: tuple[Path, dict[str, list[int]]], name: str) -> None:
    folder, statuses = one_process
    assert statuses["uncut"] == [0]
    assert statuses[name] == [-signal.SIGKILL, 0]
    check(folder, name)
    assert len(outcome(folder / name)[0]) == 3


@pytest.mark.slow
def test_the_comparison_sees_an_unseeded_batch(one_process: tuple[Path, dict[str, list[int]]]) -> None:
    # A cut run then draws other dropout masks after its resume.
    folder, statuses = one_process
    assert statuses["unseeded"] == [-signal.SIGKILL, 0]
    assert not equal(folder / "uncut-unseeded", folder / "unseeded")


@pytest.mark.slow
def test_one_process_killed_at_every_write(tmp_path: Path) -> None:
    pairs = [cut_and_continued(label(*place), {"write": place}) for place in ALL_WRITES]
    statuses = do(tmp_path, [{"run": "uncut"}, *(job for pair in pairs for job in pair)])
    assert statuses == [0, *[-signal.SIGKILL, 0] * len(pairs)]
    for first, _ in pairs:
        check(tmp_path, first["run"])


@pytest.mark.slow
def test_killed_twice_and_with_workers(tmp_path: Path) -> None:
    places = [("inject", 0, 2), ("inject", 2, 0), ("clean", 0, 1), ("defend", 1, 0)]
    jobs = [{"run": "cut", "batch": place, **STREAMING} for place in places]
    statuses = do(tmp_path, [{"run": "uncut", **STREAMING}, *jobs, {"run": "cut", **STREAMING}])
    assert statuses == [0, *[-signal.SIGKILL] * len(places), 0]
    check(tmp_path, "cut")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the images and an uncut run of two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    assert do(folder, []) == []
    call(str(WORKER), str(folder), json.dumps({"run": "uncut"}), "ddp")
    return folder


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    "job",
    [
        {"batch": ("inject", 1, 1)}, {"batch": ("clean", 1, 0), **STREAMING}, {"write": ("last.ckpt", 5, False)},
        {"write": ("final.ckpt", 1, True)},
    ],
    ids=label_of,
)  # fmt: skip
def test_two_processes(two_processes: Path, job: Job) -> None:
    first, second = cut_and_continued(label_of(job), job)
    call(str(WORKER), str(two_processes), json.dumps(first), "ddp", expected=-signal.SIGKILL)
    call(str(WORKER), str(two_processes), json.dumps(second), "ddp")
    check(two_processes, first["run"])


@pytest.mark.ddp
@pytest.mark.slow
def test_another_number_of_processes_is_refused(two_processes: Path) -> None:
    call(str(WORKER), str(two_processes), json.dumps({"run": "two", "batch": ("inject", 1, 1)}), "ddp", expected=-9)
    errors = call(str(WORKER), str(two_processes), json.dumps([{"run": "two"}]))
    assert "was made with another configuration of this run:\n  processes: was 2, is 1\n" in errors
    assert not (two_processes / "two" / "results.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.ddp)])
def test_the_command_itself(tmp_path: Path, devices: int) -> None:
    callback = {"class_path": "kill_once.KillOnce", "init_args": {"marker": str(tmp_path / "died")}}
    (tmp_path / "kill_once.py").write_text(KILL_ONCE)
    (tmp_path / "kill.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    command = ["-m", "lightning_bd", "fit", "--config", "sbl_digits", "--data.subset=400", "--trainer.max_epochs=2"]
    if devices > 1:
        command += [f"--trainer.devices={devices}", "--trainer.strategy=ddp"]
    call(*command, "--trainer.default_root_dir=uncut", folder=tmp_path)
    again = [*command, "--config", "kill.yaml", "--trainer.default_root_dir=cut"]
    call(*again, folder=tmp_path, expected=-signal.SIGKILL)
    assert (tmp_path / "died").exists()
    assert not (tmp_path / "cut" / "01_consolidate" / "final.ckpt").exists()
    call(*again, folder=tmp_path)
    assert equal(tmp_path / "uncut", tmp_path / "cut")


KILL_ONCE = '''
import os, signal
from pathlib import Path
from lightning.pytorch import Callback

class KillOnce(Callback):
    """Kill the whole run in the second epoch of the second phase, but only once."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_train_epoch_start(self, trainer, pl_module):
        here = Path(trainer.default_root_dir).name == "01_consolidate" and trainer.current_epoch == 1
        if here and trainer.is_global_zero and not self.marker.exists():
            self.marker.touch()
            os.killpg(0, signal.SIGKILL)
'''
