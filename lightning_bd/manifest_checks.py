"""What a manifest's fields must be before anything is made of them: a file is not trusted."""

from collections.abc import Callable

__all__ = ("CHECKS", "LATER_FIELDS", "MAX_DEPTH", "Plain", "is_recipe")

Plain = str | int | float | bool | None | list["Plain"] | dict[str, "Plain"]

#: Of triggers in triggers: a hostile file must not use up Python's stack, when it is read or when its trigger is used.
MAX_DEPTH = 8


def is_recipe(value: object) -> bool:
    """Return whether a value names a class and its arguments.

    Args:
        value: Anything that JSON holds.
    """
    return isinstance(value, dict) and isinstance(value.get("class"), str) and isinstance(value.get("arguments"), dict)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_integer(side) and side > 0 for side in value)


def _is_classes(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_integer(label) and label >= 0 for label in value)


def _is_shallow(value: object, depth: int = 4 * MAX_DEPTH) -> bool:
    """Return whether mappings and lists lie in each other no deeper than a trigger's parts may."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return all(depth > 0 and _is_shallow(part, depth - 1) for part in parts)


def _is_trigger(value: object) -> bool:
    return is_recipe(value) and _is_shallow(value)


def _is_crafting(value: object) -> bool:
    return isinstance(value, dict) and is_recipe(value) and isinstance(value.get("attack_images"), str | None)


def _is_dataset(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(item, str | int) for item in value.values()):
        return False
    return _is_integer(value.get("classes")) and value["classes"] > 0


#: Per field: what it must be, in words and as a test. A file is not trusted before these hold.
CHECKS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "trigger": ("a class and its arguments", _is_trigger),
    "image_shape": ("three positive integers", _is_shape),
    "label_map": ("a class and its arguments", is_recipe),
    "rate": ("a share in [0, 1]", _is_share),
    "mode": ("'static' or 'dynamic'", lambda value: value in ("static", "dynamic")),
    "clean_label": ("a boolean", lambda value: isinstance(value, bool)),
    "cover_rate": ("a share in [0, 1]", _is_share),
    "seed": ("an integer", _is_integer),
    "dataset": ("names and numbers with a positive number of `classes`", _is_dataset),
    "cover_classes": ("classes or nothing", lambda value: value is None or _is_classes(value)),
    "crafting": ("a class, its arguments and a digest, or nothing", lambda value: value is None or _is_crafting(value)),
}
#: What the fields mean where they are missing: the first manifests were written without them.
LATER_FIELDS: dict[str, Plain] = {"cover_classes": None, "crafting": None}
