"""What a run leaves on disk, and how the same command finds its place in it again."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bd.description import Description, differences
from lightning_bd.files import write_text_atomically
from lightning_bd.tables import write_rows

__all__ = ("PhaseFolder", "PhaseResult", "RunFolder")

# Of results.csv.
_COLUMNS = (
    "phase", "start_from", "clean_accuracy", "attack_success_rate", "attack_success_low", "attack_success_high",
    "robust_accuracy", "defense_effectiveness_rating", "distance", "epochs", "seconds", "steps", "note",
)  # fmt: skip


@dataclass
class PhaseResult:
    """One row of ``results.csv``.

    Attributes:
        phase: Name of the phase.
        start_from: The phase whose model it started from, or ``init``.
        clean_accuracy: On the clean test set, in [0, 1].
        attack_success_rate: On triggered test images of other classes, in [0, 1]; ``None`` without a poison.
        robust_accuracy: Triggered images predicted as their original label, in [0, 1]; ``None`` without a poison.
        epochs: Epochs trained, those of a defense included.
        seconds: Time in training, all attempts together.
        steps: Optimizer steps from ``init`` to the end of this phase.
        note: What a defense has to say, or why it could not be applied.
        values: Named numbers that a defense reports; not in ``results.csv``.
        attack_success_low: Lower end of the attack success rate's 95 % Wilson interval.
        attack_success_high: Upper end.
        defense_effectiveness_rating: Of a defense, against the model that it started from, in [0, 1].
        distance: L2 distance of the parameters from where the phase started.
        applied: Whether the phase did its work; of a defense that could not be applied all rates are ``None``.
        defends: Whether the phase was a defense, or the model that defenses are compared with.
    """

    phase: str
    start_from: str
    clean_accuracy: float | None
    attack_success_rate: float | None
    robust_accuracy: float | None
    epochs: int
    seconds: float
    steps: int
    note: str = ""
    values: dict[str, float] = field(default_factory=dict)
    attack_success_low: float | None = None
    attack_success_high: float | None = None
    defense_effectiveness_rating: float | None = None
    distance: float | None = None
    applied: bool = True
    defends: bool = False


class PhaseFolder:
    """The folder of one phase: ``checkpoints/last.ckpt``, ``final.ckpt``, logs, and ``result.json`` when finished.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.final = path / "final.ckpt"

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to go on from; else the phase may as well be another one."""
        return self.last.is_file() or self.final.is_file() or (self.path / "result.json").is_file()

    def result(self) -> PhaseResult | None:
        """Return the phase's result, ``None`` if it has not finished."""
        file = self.path / "result.json"
        if not file.is_file():
            return None
        values = _read_mapping(file)
        try:
            return PhaseResult(**values)
        except TypeError as error:
            raise _broken(file, error) from None

    def finish(self, result: PhaseResult) -> None:
        """Write the result and remove what only a cut phase needs; from now on the phase counts as finished."""
        self.last.unlink(missing_ok=True)
        # What a process that was killed while it wrote has left.
        for file in (self.last, self.final):
            for unfinished in file.parent.glob(f".{file.name}.*"):
                unfinished.unlink()
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()
        write_text_atomically(self.path / "result.json", json.dumps(asdict(result), indent=2) + "\n")


class RunFolder:
    """The folder of a run.

    Args:
        root: The folder; need not exist.
        phases: Names of the run's phases, in order.
        collects: Whether finished phases of earlier runs that are not named now keep their rows.
        marker: The file by which such a folder is known.
    """

    def __init__(self, root: Path, phases: Sequence[str], *, collects: bool = False, marker: str = "run.json") -> None:
        self.root = root
        self._marker = marker
        self.initial = root / "init.ckpt"
        self._phases = list(phases)
        self._collects = collects

    def phase(self, name: str) -> PhaseFolder:
        """Return the folder of a phase: ``NN_name``; the number is the phase's place when it first ran."""
        existing = [path for path in self._folders() if path.name.partition("_")[2] == name]
        if existing:
            return PhaseFolder(existing[0])
        number = self._phases.index(name)
        if self._collects:
            number = max([number - 1, *(int(path.name.split("_")[0]) for path in self._folders())]) + 1
        return PhaseFolder(self.root / f"{number:02d}_{name}")

    def results(self) -> list[PhaseResult]:
        """Return the results of the finished phases, in order; with ``collects`` in that of the folders."""
        folders = map(PhaseFolder, self._folders()) if self._collects else map(self.phase, self._phases)
        found = (folder.result() for folder in folders)
        return [result for result in found if result is not None]

    def open(self, run: Description, phases: Mapping[str, Description]) -> None:
        """Make the folder, or check that it belongs to this run.

        Args:
            run: Model, data and seed.
            phases: Each phase's own description.

        Raises:
            MisconfigurationException: If the folder was made by another model, data or seed, or a phase in it has
                another configuration; the message says what differs.
        """
        for file, now, what in [(self.root / "run.json", run, "this run")] + [
            (self.phase(name).path / "phase.json", phases[name], f"phase `{name}`")
            for name in self._phases
            if self.phase(name).has_begun
        ]:
            if not file.is_file():
                continue
            before = _read_mapping(file)
            found = differences(before, now)
            if found:
                shown = "".join(f"\n  {line}" for line in found[:10])
                raise MisconfigurationException(
                    f"The folder {self.root} was made with another configuration of {what}:{shown}\n"
                    "Give another `trainer.default_root_dir`, or start over with `--fresh` (the old folder is renamed)."
                )
        self.root.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.root / "run.json", json.dumps(run, indent=2) + "\n")

    def start_phase(self, name: str, description: Description) -> PhaseFolder:
        """Make a phase's folder and note the phase's configuration in it."""
        folder = self.phase(name)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder.path / "phase.json", json.dumps(description, indent=2) + "\n")
        return folder

    def rename_old(self) -> Path | None:
        """Move an existing run aside; return its new name.

        Raises:
            MisconfigurationException: If the folder is not a run's.
        """
        if not self.root.exists():
            return None
        if any(self.root.iterdir()) and not (self.root / self._marker).is_file():
            raise MisconfigurationException(
                f"`--fresh` renames the folder of an old run, but {self.root} is none: it has no {self._marker}. "
                "Give another `trainer.default_root_dir`."
            )
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        names = (
            f"{self.root.name}.old-{stamp}{end}" for end in itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
        )
        target = next(path for path in map(self.root.with_name, names) if not path.exists())
        self.root.rename(target)
        return target

    def _folders(self) -> list[Path]:
        found = [
            path for path in self.root.glob("[0-9][0-9]*_*") if path.is_dir() and path.name.split("_")[0].isdigit()
        ]
        return sorted(found, key=lambda path: (int(path.name.split("_")[0]), path.name))

    def write_results(self) -> None:
        """Write ``results.csv`` from the finished phases."""
        write_rows(self.root / "results.csv", _COLUMNS, [asdict(result) for result in self.results()])


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(file, error) from None
    if not isinstance(values, dict):
        raise _broken(file, "not a mapping")
    return values


def _broken(file: Path, why: object) -> MisconfigurationException:
    return MisconfigurationException(
        f"Cannot read {file}: {why}. Start over with `--fresh` (the old folder is renamed)."
    )
