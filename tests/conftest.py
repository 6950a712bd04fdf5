"""Shared set-up of the tests."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bd.cli import main


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors are faster on one thread, and sums do not depend on the machine."""
    torch.set_num_threads(1)


CONFIG = """
seed_everything: 1
model:
  backbone: {class_path: lightning_bd.backbones.small_cnn, init_args: {num_classes: 10, in_channels: 1, width: 4}}
  num_classes: 10
data:
  class_path: lightning_bd.datamodules.DigitsDataModule
  init_args:
    splits: {inject: 0.6, consolidate: 0.2, defend: 0.2}
    batch_size: 64
    subset: 300
    poison:
      trigger: {class_path: lightning_bd.triggers.BadNets, init_args: {size: 2, pattern: white}}
      rate: 0.1
      target: 0
trainer:
  accelerator: cpu
  enable_progress_bar: false
  logger: false
  phases:
    inject:
      split: inject
      poisoned: true
      max_epochs: 2
      optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}
    consolidate:
      split: consolidate
      max_epochs: 1
      optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}
"""


@dataclass
class Outcome:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    def check_refused(self, words: list[str]) -> None:
        """Fail unless the command was refused with a readable error that has these words."""
        assert self.status == 2, self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("Seed set to")]
        assert len(lines) < 15, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, self.err
        # The name stands at the top, before any explanation.
        assert words[0] in "\n".join(lines[:2]), self.err


Command = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is learnt or scored is kept in no folder of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_BD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder with one config; nothing of a run is left in the environment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)
    # Lightning 2.6 calls methods that jsonargparse 4.49 renamed.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture
def lightning_bd(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs ``lightning-bd`` in this process."""

    def run(*args: object) -> Outcome:
        status: Any = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as leaving:
            status = leaving.code or 0
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of ``small.yaml``."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(CONFIG)
    before = {name: os.environ.pop(name, None) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    try:
        main(["fit", "--config", str(folder / "small.yaml"), f"--trainer.default_root_dir={folder / 'run'}"])
    finally:
        del os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"]
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
    return folder / "run"
