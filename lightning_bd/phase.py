"""One phase of sequential learning, and the tree that phases form."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_bd.batch import PoisonMode
from lightning_bd.callbacks.defense import Defense

__all__ = ("INIT", "Phase", "check_phase", "in_order", "name_phases", "phase_parents")

#: What `start_from` calls the run's initial weights.
INIT = "init"

# Trainer arguments that a phase sets by its own fields, or that the run decides.
_OURS = {"callbacks": "callbacks", "max_epochs": "max_epochs", "default_root_dir": None, "logger": None}


@dataclass
class Phase:
    """One phase of a run: which data, from which model, how trained.

    A phase defends if its name starts with ``defend``, its split is ``defend``, or it has a
    :class:`~lightning_bd.callbacks.Defense`; it then sees a :class:`~lightning_bd.datamodules.DefenderView` and
    nothing else of the data.

    Args:
        name: Name of the phase and its folder; in YAML the key of the mapping.
        split: The datamodule's split to train on, or several, joined; all if not given.
        poisoned: Whether the data is poisoned; ``static`` or ``dynamic`` overrides the poison's own mode.
        batch_size: Images per batch and process; the datamodule's if not given.
        max_epochs: Epochs of the phase; 0 for a defense that trains by itself.
        start_from: The phase whose final model this one starts from, or ``init`` for the run's initial weights;
            the phase before if not given.
        optimizer: Makes the optimizer; the model's own if not given.
        lr_scheduler: Makes the scheduler, stepped once per epoch.
        callbacks: Callbacks of this phase only.
        trainer: Arguments of ``lightning.pytorch.Trainer`` for this phase only, such as ``gradient_clip_val``.
    """

    name: str | None = None
    split: str | list[str] | None = None
    poisoned: bool | PoisonMode = False
    batch_size: int | None = None
    max_epochs: int | None = None
    start_from: str | None = None
    optimizer: OptimizerCallable | None = None
    lr_scheduler: LRSchedulerCallable | None = None
    callbacks: list[Callback] = field(default_factory=list)
    trainer: dict[str, Any] | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        if self.split is None:
            return ()
        return (self.split,) if isinstance(self.split, str) else tuple(self.split)

    @property
    def defends(self) -> bool:
        """Whether the phase sees a defender's view of the data."""
        named = (self.name or "").startswith("defend") or self.splits == ("defend",)
        return named or any(isinstance(callback, Defense) for callback in self.callbacks)


def name_phases(phases: dict[str, Phase] | list[Phase]) -> dict[str, Phase]:
    """Return copies of the phases by name, each with its name set.

    Raises:
        MisconfigurationException: If a name is missing, repeated, or cannot be a folder's.
    """
    if isinstance(phases, dict):
        for name, phase in phases.items():
            if phase.name not in (None, name):
                raise MisconfigurationException(f"Phase `{name}`: its `name` is `{phase.name}`; leave `name` out.")
        items = list(phases.items())
    else:
        items = [(phase.name or "", phase) for phase in phases]
    named: dict[str, Phase] = {}
    for name, phase in items:
        if not name or name == INIT or "/" in name or name.startswith("."):
            raise MisconfigurationException(f"Phase `{name}`: the name must not be empty, `{INIT}` or a path.")
        if name in named:
            raise MisconfigurationException(f"Phase `{name}`: the name is used twice.")
        named[name] = copy.copy(phase)
        named[name].name = name
    return named


def phase_parents(phases: Mapping[str, Phase]) -> dict[str, str]:
    """Return the phase, or ``init``, that each phase starts from.

    Raises:
        MisconfigurationException: If ``start_from`` names no phase or closes a circle.
    """
    parents, before = {}, INIT
    for name, phase in phases.items():
        parents[name] = phase.start_from or before
        if parents[name] not in (*phases, INIT):
            raise MisconfigurationException(
                f"Phase `{name}`: `start_from` names `{parents[name]}`, which is none of the phases "
                f"({', '.join(phases)}) nor `{INIT}`."
            )
        before = name
    for name in phases:
        chain = [name]
        while parents[chain[-1]] != INIT:
            chain.append(parents[chain[-1]])
            if len(set(chain)) < len(chain):
                raise MisconfigurationException(
                    f"Phase `{name}`: `start_from` goes in a circle: {' from '.join(chain)}."
                )
    return parents


def in_order(parents: Mapping[str, str]) -> list[str]:
    """Return the phases with every parent before its children, else as listed."""
    order: list[str] = []
    while len(order) < len(parents):
        order += [next(n for n in parents if n not in order and parents[n] in (*order, INIT))]
    return order


def check_phase(phase: Phase, phases: Mapping[str, Phase]) -> None:
    """Check what can be checked of a phase before anything runs.

    Raises:
        MisconfigurationException: If options contradict each other, or ``trainer`` has one that Trainer lacks.
    """
    if phase.lr_scheduler is not None and phase.optimizer is None:
        raise MisconfigurationException(f"Phase `{phase.name}`: `lr_scheduler` needs an `optimizer` beside it.")
    if phase.batch_size is not None and phase.batch_size < 1:
        raise MisconfigurationException(f"Phase `{phase.name}`: `batch_size` must be positive, not {phase.batch_size}.")
    if phase.max_epochs is not None and phase.max_epochs < 0:
        raise MisconfigurationException(
            f"Phase `{phase.name}`: `max_epochs` must be 0 or more, not {phase.max_epochs}: a phase has to end."
        )
    if phase.defends and phase.poisoned:
        raise MisconfigurationException(
            f"Phase `{phase.name}` defends (by its name, split or a defense), so it cannot be `poisoned`."
        )
    for other in phases.values():
        if other is not phase and any(mine is theirs for mine in phase.callbacks for theirs in other.callbacks):
            raise MisconfigurationException(
                f"Phases `{phase.name}` and `{other.name}` share a callback object; give each its own."
            )
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    for name in phase.trainer or {}:
        if name in _OURS:
            instead = f"use the phase's `{_OURS[name]}`" if _OURS[name] else "it is the run's to choose"
            raise MisconfigurationException(f"Phase `{phase.name}`: `trainer.{name}` cannot be set here; {instead}.")
        if name not in known:
            raise MisconfigurationException(f"Phase `{phase.name}`: `trainer.{name}` is not an argument of Trainer.")
