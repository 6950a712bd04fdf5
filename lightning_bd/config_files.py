"""Configs: found by name, read strictly, merged by the names of their phases."""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_bd.phase import Phase

__all__ = (
    "ConfigError",
    "expand_configs",
    "find_config",
    "merged_config",
    "named_files",
    "read_config",
    "read_mapping",
    "shipped_configs",
    "split_configs",
)


class ConfigError(ValueError):
    """A config cannot be found or read."""


def shipped_configs(kind: Literal["recipe", "attack", "defense", "detection"] = "recipe") -> dict[str, Path]:
    """Return the configs that come with the library, by name.

    Args:
        kind: Whole recipes, attacks to put behind one (``attack/<name>``), the phases of defenses, or detectors.
    """
    folder = Path(str(resources.files("lightning_bd.configs")))
    if kind != "recipe":
        folder /= kind
    prefix = "attack/" if kind == "attack" else ""
    return {f"{prefix}{path.stem}": path for path in sorted(folder.glob("*.yaml"))}


def named_files(wanted: str | Sequence[str], shipped: Mapping[str, Path], noun: str) -> dict[str, Path]:
    """Find the files of defenses or detectors that a user names.

    Args:
        wanted: Shipped names or YAML files of one's own, as a list or joined by commas or spaces; ``all``: every
            shipped one.
        shipped: Name -> file of those that come with the library.
        noun: What they are, for messages.

    Returns:
        Name -> file; a file's name is its stem.

    Raises:
        ConfigError: If one does not exist or is named twice, or none is named.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [part for name in names for part in name.replace(",", " ").split()]
    names = [each for name in names for each in (shipped if name == "all" else [name])]
    if not names:
        raise ConfigError(f"No {noun} is named. Shipped are {', '.join(shipped)}, or `all`.")
    found: dict[str, Path] = {}
    for name in names:
        path = shipped.get(name)
        if path is None and Path(name).is_file():
            path, name = Path(name), Path(name).stem
        if path is None and (name.endswith((".yaml", ".yml")) or "/" in name):
            raise ConfigError(f"There is no file `{name}` with a {noun}.")
        if path is None:
            close = difflib.get_close_matches(name, shipped, n=1)
            guess = f" Did you mean `{close[0]}`?" if close else ""
            raise ConfigError(
                f"There is no {noun} `{name}`: shipped are {', '.join(shipped)}; `all` is all of these.{guess}"
            )
        if name in found:
            raise ConfigError(f"The {noun} `{name}` is named twice.")
        found[name] = path
    return found


def find_config(name: str) -> Path:
    """Return the file of a config.

    Args:
        name: A path, or the name of a shipped config.

    Raises:
        ConfigError: If there is neither; the message lists what is shipped.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs() | shipped_configs("attack")
    if name in shipped:
        return shipped[name]
    close = difflib.get_close_matches(name, shipped, n=1)
    guess = f" Did you mean `{close[0]}`?" if close else ""
    raise ConfigError(f"There is no config `{name}`: no such file, and shipped are {', '.join(shipped)}.{guess}")


def merged_config(names: Sequence[str]) -> dict[str, Any]:
    """Return the content of configs, merged.

    Mappings are merged key by key, phases by their names; lists and other values of a later config replace those of
    an earlier one, and so does another class with its arguments.

    Args:
        names: Paths, or names of shipped configs.

    Raises:
        ConfigError: If one cannot be found or read, or all are attacks that change a config and are none.
    """
    attacks = shipped_configs("attack")
    if names and all(name in attacks for name in names):
        raise ConfigError(
            f"`{names[0]}` says how to poison and nothing else: --config badnets_digits --config {names[0]}"
        )
    merged: dict[str, Any] = {}
    for name in names:
        merged = _merge(merged, _with_flat_model(read_config(find_config(name))))
    return merged


def split_configs(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the configs on a command line, and its other arguments.

    Args:
        args: Arguments of ``lightning-bd``.
    """
    names, rest = [], []
    remaining = iter(args)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c"):
            names.append(value if equals else next(remaining, ""))
        else:
            rest.append(argument)
    return names, rest


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML config; a key that is given twice is an error, and so is a phase's unknown option.

    Args:
        path: The file.

    Raises:
        ConfigError: If it is not YAML, not a mapping, or has a repeated or unknown key.
    """
    config = read_mapping(path)
    if config.get("trainer") is None:
        config.pop("trainer", None)
    _check_phases(config, path)
    return config


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a key that is given twice is an error.

    Args:
        path: The file.

    Raises:
        ConfigError: If it is not YAML, not a mapping, or has a repeated key.
    """
    try:
        with path.open(encoding="utf-8") as file:
            config = yaml.load(file, _UniqueKeyLoader)  # noqa: S506 (a subclass of SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read the config {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"The config {path} is not a mapping.")
    return config


def expand_configs(args: list[str], folder: Path) -> list[str]:
    """Replace the command line's configs, by name or path, by their merged content.

    The run's folder is ``runs/<name of the first config>``, with the names of shipped attacks behind it, unless a
    config or the command line says. ``model.class_path`` is left out: it says which parser there is.

    Args:
        args: Arguments of ``lightning-bd``.
        folder: Where the merged config is written.

    Returns:
        The arguments with one ``--config``.
    """
    names, rest = split_configs(args)
    if not names:
        return rest
    merged = merged_config(names)
    _check_phase_overrides(rest, (merged.get("trainer") or {}).get("phases") or {})
    stems = [Path(name).stem for name in names]
    attacks = [stem for name, stem in zip(names[1:], stems[1:], strict=True) if name.startswith("attack/")]
    merged.setdefault("trainer", {}).setdefault("default_root_dir", str(Path("runs") / "-".join([stems[0], *attacks])))
    if isinstance(model := merged.get("model"), dict):
        model.pop("class_path", None)
    subcommand, *others = rest if rest else [""]
    if subcommand.startswith("-"):
        raise ConfigError(f"The subcommand comes first: lightning-bd fit --config {names[0]} ...")
    file = folder / f"{stems[0]}.yaml"
    file.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    return [subcommand, f"--config={file}", *others]


def _with_flat_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose model's arguments stand beside ``class_path``, as they do where no class is named."""
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_args"), dict):
        return config
    rest = {key: value for key, value in model.items() if key != "init_args"}
    return {**config, "model": _merge(rest, model["init_args"])}


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    if "class_path" in update and update["class_path"] != base.get("class_path"):
        # Another class has other arguments.
        merged.pop("init_args", None)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _check_phases(config: dict[str, Any], path: Path) -> None:
    trainer = config.get("trainer", {})
    if not isinstance(trainer, dict):
        raise ConfigError(f"{path}: `trainer` must be a mapping, but is {trainer!r}.")
    phases = trainer.get("phases") or {}
    if not isinstance(phases, dict):
        raise ConfigError(f"{path}: `trainer.phases` must map names to phases, so that overrides can name them.")
    known = [field.name for field in fields(Phase)]
    for name, phase in phases.items():
        if not isinstance(phase, dict):
            raise ConfigError(f"Phase `{name}` in {path}: expected options such as `max_epochs`, but got {phase!r}.")
        for option in phase:
            if option not in known:
                raise ConfigError(f"Phase `{name}` in {path}: there is no option `{option}`.{_guess(option, known)}")


def _check_phase_overrides(args: list[str], phases: dict[str, Any]) -> None:
    """Check ``--trainer.phases.NAME.OPTION``; the parser's own message names neither."""
    known = [field.name for field in fields(Phase)]
    for argument in args:
        if not argument.startswith("--trainer.phases."):
            continue
        path = argument.removeprefix("--trainer.phases.").partition("=")[0]
        name = next((phase for phase in phases if path == phase or path.startswith(f"{phase}.")), None)
        if name is None:
            raise ConfigError(f"{argument}: there is no such phase.{_guess(path.partition('.')[0], list(phases))}")
        option = path.removeprefix(name).strip(".").partition(".")[0].rstrip("+")
        if option and option not in known:
            raise ConfigError(f"Phase `{name}`: there is no option `{option}`.{_guess(option, known)}")


def _guess(name: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean `{close[0]}`?" if close else f" Known are {', '.join(known)}."


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing."""

    def compose_mapping_node(self, anchor: object) -> yaml.MappingNode:
        # Looked at before `<<` is resolved, for a merged key may be given again.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # type: ignore[arg-type]
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key `{key.value}` is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


# PyYAML reads 1e-3 as a string, YAML 1.2 as a number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
