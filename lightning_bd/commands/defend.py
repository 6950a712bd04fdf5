"""``lightning-bd defend``: run defenses on one checkpoint and compare what they do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bd.config_files import ConfigError, named_files, read_mapping, shipped_configs
from lightning_bd.phase import Phase, check_phase

__all__ = ("UNDEFENDED", "DefenseFailedError", "load_defenses", "plan_phases", "shipped_defenses")

#: The row of the checkpoint as it is.
UNDEFENDED = "none"


class DefenseFailedError(RuntimeError):
    """At least one defense ended with an error; the others have their rows."""


def shipped_defenses() -> dict[str, Path]:
    """Return the configs of the defenses that come with the library, by name."""
    return shipped_configs("defense")


def load_defenses(wanted: str | Sequence[str]) -> dict[str, Phase]:
    """Read defenses by name.

    Args:
        wanted: Names of shipped defenses or YAML files of one's own, each the options of a phase; as a list or joined
            by commas or spaces. ``all``: every shipped one.

    Returns:
        Name -> phase; a file's name is that of the file.

    Raises:
        ConfigError: If a defense does not exist, is named twice, or its file is not a phase with a defense.
    """
    files = named_files(wanted, shipped_defenses(), "defense")
    if UNDEFENDED in files:
        raise ConfigError(f"The defense `{UNDEFENDED}` has the name of the undefended model's row.")
    return {name: _read_phase(path) for name, path in files.items()}


def plan_phases(defenses: Mapping[str, Phase], split: str, batch_size: int | None) -> dict[str, Phase]:
    """Lay out one phase for the checkpoint as it is and one per defense, all from the same weights.

    Args:
        defenses: Name -> phase.
        split: The split that each defense gets, where its phase does not say.
        batch_size: Images per batch, where its phase does not say.
    """
    phases = {UNDEFENDED: Phase(UNDEFENDED, split="defend", max_epochs=0)}
    for name, phase in defenses.items():
        phases[name] = replace(
            phase,
            name=name,
            start_from=UNDEFENDED,
            max_epochs=0 if phase.max_epochs is None else phase.max_epochs,
            batch_size=phase.batch_size or batch_size,
        )
    for name, phase in phases.items():
        phase.split = defenses[name].split or split if name in defenses else split
        check_phase(phase, phases)
        if name in defenses and not phase.defends:
            raise MisconfigurationException(
                f"The defense `{name}` would see all of the data: give it a callback of lightning_bd.callbacks.defense,"
                " or use `split: defend`."
            )
    return phases


@dataclass
class _DefenseFile:
    """What a YAML file of a defense holds: the options of a phase, jsonargparse's way to a typed schema."""

    phase: Phase = field(default_factory=Phase)


def _read_phase(path: Path) -> Phase:
    options = read_mapping(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_DefenseFile, None)
    try:
        config = parser.parse_object({"phase": options})
        phase: Any = parser.instantiate_classes(config).phase
    except Exception as error:  # noqa: BLE001 (jsonargparse raises many kinds)
        raise ConfigError(f"The defense {path} is not a phase: {error}") from None
    assert isinstance(phase, Phase)
    return phase
