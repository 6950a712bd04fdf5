"""Set-up of the tests of selection."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the tables of one test."""
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "selection"
