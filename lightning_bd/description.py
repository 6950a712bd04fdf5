"""Describing objects as plain values, to tell whether two runs are the same."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ("Description", "describe", "differences")

Description = str | int | float | bool | None | list["Description"] | dict[str, "Description"]


def describe(value: object) -> Description:
    """Describe a value by its class and its constructor's arguments, as far as it keeps them.

    Args:
        value: Anything; plain values and containers describe themselves, modules also their parameters' shapes.

    Example:
        >>> describe({"split": ("inject",), "rate": 0.1})
        {'split': ['inject'], 'rate': 0.1}
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, Path | timedelta | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    if isinstance(value, Set):
        return [describe(item) for item in sorted(value, key=repr)]
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    if isinstance(value, functools.partial):
        parts = [part for part in (value.func, *value.args) if not _wraps(part)]
        named: dict[str, Description] = {str(k): describe(v) for k, v in value.keywords.items()}
        return {"call": [describe(part) for part in parts], **named}
    if inspect.isclass(value) or inspect.isroutine(value):
        return _name(value)
    described: dict[str, Description] = {"class": _name(type(value))}
    if isinstance(value, nn.Module) and not hasattr(value, "hyperparameters"):
        described["parameters"] = [f"{name} {tuple(p.shape)}" for name, p in value.state_dict().items()]
        # Inner layers without parameters, such as dropout, show in the text only, which would be long to keep.
        if any(True for _ in value.children()):
            described["text_sha256"] = hashlib.sha256(repr(value).encode()).hexdigest()[:16]
    return described | {name: describe(item) for name, item in _arguments(value).items()}


def differences(before: Description, now: Description, where: str = "") -> list[str]:
    """Say where two descriptions differ, one line per place.

    Example:
        >>> differences({"data": {"rate": 0.1}}, {"data": {"rate": 0.05}})
        ['data.rate: was 0.1, is 0.05']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for number, (a, b) in enumerate(zip(before, now, strict=True))
            for line in differences(a, b, f"{where}.{number}")
        ]
    return [] if before == now else [f"{where}: was {_short(before)}, is {_short(now)}"]


def _arguments(value: object) -> dict[str, object]:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    names = inspect.signature(type(value)).parameters
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _name(value: type | Callable[..., object]) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _wraps(value: object) -> bool:
    """Whether it is what jsonargparse puts around a class; the class is among the partial's arguments."""
    if not inspect.isfunction(value):
        return type(value).__module__.startswith("jsonargparse")
    return value.__module__.startswith("jsonargparse") or "call_without_instantiate" in value.__qualname__


def _short(value: Description) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
