"""What is kept for the next run."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_bd.cache import cache_folder, content_key, keep_tensors, read_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor([1, 2], dtype=torch.uint8)}


def test_the_folder_is_the_variables_or_the_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path))
    assert cache_folder("triggers") == tmp_path / "triggers"
    monkeypatch.setenv("LIGHTNING_BD_CACHE", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert cache_folder("triggers") == tmp_path / "me" / ".cache" / "lightning_bd" / "triggers"
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_of_all_that_is_given() -> None:
    labels, chosen = torch.tensor([3, 1], dtype=torch.uint8), torch.tensor([True, False])
    key = content_key({"b": [1], "a": None}, [b"one", b"two"], labels, chosen)
    parts = [json.dumps({"a": None, "b": [1]}).encode(), b"one", b"two"]
    parts += [number.to_bytes(8, "little") for number in (3, 1, 1, 0)]
    assert key == hashlib.sha256(b"".join(parts)).hexdigest()
    others = [
        content_key({"b": [2], "a": None}, [b"one", b"two"], labels, chosen),
        content_key({"b": [1], "a": None}, [b"two", b"one"], labels, chosen),
        content_key({"b": [1], "a": None}, [b"one", b"two"], chosen, labels),
    ]
    assert len({key, *others}) == 4


def test_what_is_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.safetensors"
    assert read_tensors(path, "It", dict) is None
    keep_tensors(path, TENSORS, "It")
    found = read_tensors(path, "It", dict)
    assert found is not None
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    assert [file.name for file in path.parent.iterdir()] == ["file.safetensors"]


def refuse(tensors: dict[str, Tensor]) -> None:
    raise ValueError("they are of another model")


@pytest.mark.parametrize("spoilt", ["cut", "empty", "refused", "a folder"])
def test_what_is_broken_is_left_out_with_a_warning(tmp_path: Path, spoilt: str) -> None:
    path = tmp_path / "file.safetensors"
    if spoilt == "a folder":
        path.mkdir()
    else:
        keep_tensors(path, TENSORS, "It")
        path.write_bytes({"cut": path.read_bytes()[:-1], "empty": b"", "refused": path.read_bytes()}[spoilt])
    with pytest.warns(UserWarning, match=r"^It in .*file\.safetensors is broken and made anew: ."):
        assert read_tensors(path, "It", refuse if spoilt == "refused" else dict) is None


def test_a_full_disk_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match=r"^It could not be kept for the next run: .*No space.*LIGHTNING_BD_CACHE"):
        keep_tensors(tmp_path / "file.safetensors", TENSORS, "It")
    with pytest.warns(UserWarning, match=r"No space left.* Sell it\.$"):
        keep_tensors(tmp_path / "file.safetensors", TENSORS, "It", "Sell it.")
    assert list(tmp_path.iterdir()) == []
