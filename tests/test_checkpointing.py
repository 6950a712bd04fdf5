"""Checkpoints: whole or old, and read without running anything."""

import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.checkpointing import (
    AtomicCheckpointIO,
    CheckpointError,
    check_weights,
    read_checkpoint,
    save_atomically,
)

CHECKPOINT = {"state_dict": {"weight": torch.arange(1000.0)}, "epoch": 3}


class Evil:
    """Unpickled, it makes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


class BreaksWhileWritten:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        raise OSError("no space left")


def test_round_trip_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "model.ckpt"
    save_atomically(CHECKPOINT, path)
    read = read_checkpoint(path)
    assert torch.equal(read["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])  # type: ignore[index]
    assert read["epoch"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("moment", ["serialise", "flush to disk", "rename"])
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "model.ckpt"
    save_atomically(CHECKPOINT, path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("no space left")

    value: dict[str, object] = {"state_dict": {"weight": torch.zeros(1000)}}
    if moment == "serialise":
        value["broken"] = BreaksWhileWritten()
    elif moment == "flush to disk":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_atomically(value, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]


def test_the_file_is_whole_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(number: int) -> None:
        events.append("fsync")
        fsync(number)

    def note_replace(self: Path, target: Path) -> Path:
        events.append("replace")
        assert self.parent == target.parent
        torch.load(self, weights_only=True)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    save_atomically(CHECKPOINT, tmp_path / "model.ckpt")
    assert events == ["fsync", "replace"]


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    """A temporary file is private; a checkpoint is not."""
    save_atomically(CHECKPOINT, tmp_path / "model.ckpt")
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "model.ckpt").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_nothing_in_a_hostile_file_is_executed(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "hostile.ckpt", tmp_path / "marker"
    content = {"state_dict": {"weight": torch.zeros(2)}, "evil": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}, "evil": Evil(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(
        CheckpointError, match=r"Refused to load .*hostile\.ckpt: it holds more than .* Nothing was exec"
    ) as e:
        read_checkpoint(path)
    assert re.search(r"\(.*(posix|nt)\.mkdir.*\)$", str(e.value)), "what it wanted to run is named"
    assert "weights_only" not in str(e.value), "torch's advice to load it all the same is left out"
    assert not marker.exists()
    with pytest.raises(CheckpointError, match="Nothing was executed"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not marker.exists()
    # The file does what it is here for.
    with path.open("rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert marker.exists()


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*gone\.ckpt\. A finished phase leaves one at <run>/NN_"):
        read_checkpoint(tmp_path / "gone.ckpt")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # a wrong byte may be that number
@pytest.mark.parametrize("legacy", [False, True])
def test_broken_files_are_named(tmp_path: Path, legacy: bool) -> None:
    """Cut anywhere, or any byte wrong: a sentence with the file's name, or the right weights, never another error."""
    path = tmp_path / "broken.ckpt"
    torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (60,), generator=generator).tolist()
    contents = [whole[:length] for length in (0, 1, 2, 100, 600, len(whole) // 2, len(whole) - 1, *places)]
    for place in [*range(120), *places]:
        contents.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    contents += [b"not a checkpoint", b"\x80\x02.", b"\x80\x02]q\x00.", b"PK\x03\x04", bytes(500), b"\xff" * 500]
    messages = []
    for content in contents:
        path.write_bytes(content)
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert checkpoint["state_dict"]
    assert len(messages) > len(contents) // 3
    assert all("broken.ckpt" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"state_dict": 3}, {"state_dict": [torch.zeros(1)]}])
def test_not_a_lightning_checkpoint(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt is not a Lightning checkpoint: it has no `state_dict`"):
        read_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"0.weight": torch.zeros(3, 2)}, r"`0\.bias` \(3,\) is not in the checkpoint"),
        ({"0.weight": 3}, r"`0\.weight` is no tensor there"),
        ({}, r"`0\.weight` \(3, 2\) is not in the checkpoint"),
        (
            {"0.weight": torch.zeros(3, 9), "0.bias": torch.zeros(9)},
            r"`0\.weight` is \(3, 9\) there and \(3, 2\) in the",
        ),
        (
            {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3), "1.bias": torch.zeros(1)},
            r"the model has no `1\.b",
        ),
    ],
)
def test_check_weights_names_the_first_mismatch(weights: dict[str, Any], problem: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(
        CheckpointError, match=rf"The checkpoint given\.ckpt is of another model: {problem}.*\. Use the con"
    ):
        check_weights(model, weights, Path("given.ckpt"))


def test_check_weights_accepts_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    check_weights(model, model.state_dict(), Path("given.ckpt"))


pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Loader:
    """Lightning takes a list for several loaders."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([[torch.tensor([[1.0, 2.0], [2.0, -1.0]]), torch.tensor([0, 1])]] * 3)


def fit(folder: Path, epochs: int, resume: Path | None = None) -> Module:
    model = Module()
    Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[AtomicCheckpointIO()], callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
    ).fit(model, Loader(), ckpt_path=resume, weights_only=True)  # fmt: skip
    return model


def test_a_trainer_saves_and_resumes_through_it(tmp_path: Path) -> None:
    whole = fit(tmp_path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    check_weights(whole, read_checkpoint(tmp_path / "epoch=1.ckpt")["state_dict"], tmp_path)
    (tmp_path / "epoch=1.ckpt").unlink()
    resumed = fit(tmp_path, 2, resume=tmp_path / "epoch=0.ckpt")
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_a_trainer_that_cannot_save_keeps_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.save

    def fail_at_second(value: dict[str, object], file: IO[bytes]) -> None:
        if value["epoch"] == 1:
            raise OSError("no space left")
        original(value, file)

    monkeypatch.setattr(torch, "save", fail_at_second)
    with pytest.raises(OSError, match="no space left"):
        fit(tmp_path, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["epoch=0.ckpt"]
    assert read_checkpoint(tmp_path / "epoch=0.ckpt")["epoch"] == 0


def test_a_trainer_refuses_to_resume_from_a_hostile_file(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    fit(tmp_path, 1)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    torch.save({**checkpoint, "evil": Evil(marker)}, tmp_path / "hostile.ckpt")
    with pytest.raises(CheckpointError, match="Refused to load"):
        fit(tmp_path, 2, resume=tmp_path / "hostile.ckpt")
    assert not marker.exists()


def test_refuses_storage_options(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes no `storage_options`"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "model.ckpt", storage_options={"remote": True})
