"""Arguments as people type them, turned into the options that the parser knows."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_bd.config_files import ConfigError

__all__ = ("expand_arguments",)

# Command -> the options that its positional arguments stand for.
_POSITIONALS = {
    "interpolate": ("first", "second"),
    "landscape": ("ckpt_path",),
    "sharpness": ("ckpt_path",),
}
# Options that take several values.
_LISTS = {"--defenses", "--detectors"}
# Options without a value.
_FLAGS = {"--fresh", "--override_trigger", "--override-trigger", "--print_config", "-h", "--help"}
#: Commands that find the config of a run by its checkpoint.
_FOLLOW = (*_POSITIONALS, "defend", "score", "filter", "poison", "preview")


def expand_arguments(args: list[str]) -> list[str]:
    """Name positional arguments, join lists, and add the config of the run that a checkpoint lies in.

    Args:
        args: As typed, the command first.

    Returns:
        The same with one value per option.

    Raises:
        ConfigError: If a command gets more positional arguments than it has.
    """
    if not args or args[0] not in _FOLLOW:
        return args
    command, positionals, named = args[0], [], []
    rest = args[1:]
    while rest:
        argument = rest.pop(0)
        option, equals, _ = argument.partition("=")
        if not argument.startswith("-"):
            positionals.append(argument)
        elif equals or argument in _FLAGS or not rest or rest[0].startswith("--"):
            named.append(argument)
        elif option in _LISTS:
            values = []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            named.append(f"{option}={','.join(values)}")
        else:
            named += [argument, rest.pop(0)]
    names = _POSITIONALS.get(command, ())
    if len(positionals) > len(names):
        wanted = f"takes {len(names)} checkpoint{'s' * (len(names) > 1)}" if names else "takes no positional argument"
        raise ConfigError(f"`{command}` {wanted}, but got {', '.join(positionals)}.")
    given = {argument.partition("=")[0].removeprefix("--") for argument in named}
    missing = [name for name in names[len(positionals) :] if name not in given]
    if missing and not given & {"h", "-h", "help", "print_config"}:
        raise ConfigError(
            f"`{command}` takes {len(names)} checkpoint{'s' * (len(names) > 1)}, but got {len(positionals)}."
        )
    named = [f"--{name}={value}" for name, value in zip(names, positionals, strict=False)] + named
    return [command, *_with_config(named)]


def _with_config(args: list[str]) -> list[str]:
    """Add ``--config`` of the run folder that the first checkpoint lies in, where none is given.

    What a checkpoint itself says of its model is never used: it may be hostile.
    """
    if any(argument.partition("=")[0] in ("--config", "-c", "-h", "--help") for argument in args):
        return args
    options = {}
    for number, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        options[option] = value if equals else (args[number + 1] if number + 1 < len(args) else "")
    checkpoint = options.get("--first") or options.get("--ckpt_path")
    if not checkpoint or any(option.startswith(("--model", "--print_config")) for option in options):
        return args
    if not Path(checkpoint).is_file():
        raise ConfigError(f"There is no checkpoint {checkpoint}: the file does not exist.")
    run = Path(checkpoint).absolute().parent.parent
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{checkpoint} lies in no run: there is no config.yaml two folders above it. Give the config of its model "
            "and data: `--config NAME_OR_FILE`."
        )
    rank_zero_info(f"Using the config of the run: {run / 'config.yaml'}")
    # Beside the run, wherever the command is given; and a cap that was meant for the attack caps no defense.
    return [
        f"--config={run / 'config.yaml'}", f"--trainer.default_root_dir={run}", "--trainer.max_epochs=null", *args
    ]  # fmt: skip
