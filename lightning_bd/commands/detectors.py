"""Detectors by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_bd.callbacks.detection.base import Detector
from lightning_bd.callbacks.detection.score_table import COLUMNS
from lightning_bd.config_files import ConfigError, named_files, read_mapping, shipped_configs

__all__ = ("load_detectors", "shipped_detectors")


def shipped_detectors() -> dict[str, Path]:
    """Return the configs of the detectors that come with the library, by name."""
    return shipped_configs("detection")


def load_detectors(wanted: str | Sequence[str]) -> dict[str, Detector]:
    """Make detectors by name.

    Args:
        wanted: Names of shipped detectors or YAML files of one's own, each with ``class_path`` and ``init_args``; as a
            list or joined by commas or spaces. ``all``: every shipped one.

    Returns:
        Name -> detector; a file's name is that of the file.

    Raises:
        ConfigError: If a detector does not exist, is named twice, or its file is none.
    """
    files = named_files(wanted, shipped_detectors(), "detector")
    for name in files:
        if name in COLUMNS or name.startswith("."):
            raise ConfigError(f"A detector cannot be called `{name}`, as a column of the scores is: rename the file.")
    return {name: _read(path) for name, path in files.items()}


@dataclass
class _DetectorFile:
    """What a YAML file of a detector holds: jsonargparse's way to a typed schema."""

    detector: Detector


def _read(path: Path) -> Detector:
    options = read_mapping(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_DetectorFile, None)
    try:
        config = parser.parse_object({"detector": options})
        detector: Any = parser.instantiate_classes(config).detector
    except Exception as error:  # noqa: BLE001 (jsonargparse raises many kinds)
        raise ConfigError(f"{path} is not a detector with `class_path` and `init_args`: {error}") from None
    assert isinstance(detector, Detector)
    return detector
