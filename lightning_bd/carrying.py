"""What a callback of one phase hands to its like in the next, such as online EWC's running Fisher information."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback

__all__ = ("carried_states", "hand_over", "names_of_carriers")


@runtime_checkable
class _Carrier(Protocol):
    """A callback that builds on what one of its class learnt in an earlier fit."""

    def carried_state(self) -> dict[str, Any]: ...

    def carry_over(self, state: dict[str, Any]) -> None: ...


def names_of_carriers(callbacks: Iterable[Callback]) -> set[str]:
    """Return the class names of the callbacks that build on an earlier fit.

    Args:
        callbacks: Of one phase; one whose ``gamma`` is ``None`` forgets what was before.
    """
    return {_name(c) for c in callbacks if isinstance(c, _Carrier) and getattr(c, "gamma", 1.0) is not None}


def carried_states(
    callbacks: Iterable[Callback], wanted: set[str], inherited: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return what a phase leaves to later ones, by class name of the callback: tensors and plain values.

    Args:
        callbacks: Of a phase that has finished.
        wanted: Class names that a later phase asks for.
        inherited: What the phase before left; what has no like in this phase passes through.
    """
    own = {_name(c): c.carried_state() for c in callbacks if isinstance(c, _Carrier)}
    return {name: state for name, state in {**inherited, **own}.items() if name in wanted}


def hand_over(states: Mapping[str, dict[str, Any]], callbacks: Iterable[Callback]) -> None:
    """Give callbacks what their like left in the phase before.

    Args:
        states: As :func:`carried_states` returned them.
        callbacks: Of the phase that is about to start.
    """
    for callback in callbacks:
        if isinstance(callback, _Carrier) and _name(callback) in states:
            callback.carry_over(states[_name(callback)])


def _name(callback: object) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"
