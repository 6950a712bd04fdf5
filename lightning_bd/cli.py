"""The command line: Lightning's and ours, with shipped configs by name and readable errors."""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

from lightning_bd.checkpointing import CheckpointError
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.commands import CommandTrainer
from lightning_bd.commands.arguments import expand_arguments
from lightning_bd.commands.defend import DefenseFailedError
from lightning_bd.commands.poisoned_copy import PoisonFailedError
from lightning_bd.commands.score import DetectorFailedError
from lightning_bd.config_files import ConfigError, expand_configs, merged_config, split_configs
from lightning_bd.phase_callbacks import NonFiniteLossError
from lightning_bd.phases import MultiPhaseTrainer

__all__ = ("BackdoorCLI", "main")

# What jsonargparse tells of its attempts, of no use to whoever mistyped one value.
_NOISE = (
    "Given value",
    "Expected a <class 'NoneType'>",
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "tip:",
)

# Errors that explain themselves; others may be a bug, which needs its place.
_FAILED = (NonFiniteLossError, DefenseFailedError, DetectorFailedError, PoisonFailedError)
_EXPECTED = (MisconfigurationException, ConfigError, CheckpointError, *_FAILED)


_OURS = ("defend", "filter", "interpolate", "landscape", "poison", "preview", "score", "sharpness")
_USAGE = {
    "defend": "--ckpt_path CKPT [--config NAME_OR_FILE] [--defenses NAME ...] [options]",
    "filter": "--ckpt_path CKPT [--config NAME_OR_FILE] [--detector NAME] [--keep SHARE] [options]",
    "interpolate": "A.ckpt B.ckpt [--config NAME_OR_FILE] [options]",
    "landscape": "CKPT [--config NAME_OR_FILE] [options]",
    "poison": "--config NAME_OR_FILE --output FOLDER [--ckpt_path CKPT] [--phase NAME] [options]",
    "preview": "--config NAME_OR_FILE [--ckpt_path CKPT] [--images NUMBER] [--output FILE] [options]",
    "score": "--ckpt_path CKPT [--config NAME_OR_FILE] [--detectors NAME ...] [--ood.NAME FOLDER ...] [options]",
    "sharpness": "CKPT [--config NAME_OR_FILE] [options]",
    "test": "--config NAME_OR_FILE --ckpt_path CKPT [options]",
    "predict": "--config NAME_OR_FILE --ckpt_path CKPT [options]",
}


class _Parser(LightningArgumentParser):
    """Lightning's parser with errors that fit on a screen."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error without the values that it dumps, and leave with status 2."""
        readable = _as_typed(_readable(str(message)), sys.argv[1:])
        # The parser of a nested option does not know the command.
        command = ["lightning-bd", *(arg for arg in sys.argv[1:2] if arg in BackdoorCLI.subcommands()), "--help"]
        sys.stderr.write(f"error: {readable}\nAll options: {' '.join(command)}\n")
        raise SystemExit(2) from ex


class BackdoorCLI(LightningCLI):
    """Lightning's commands and ours for a :class:`BackdoorClassifier` and any image datamodule.

    Another ``trainer_class`` has to be a :class:`~lightning_bd.commands.CommandTrainer`, which has the methods.
    """

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        *,
        args: list[str] | None = None,
        **options: Any,
    ) -> None:
        typed = sys.argv[1:] if args is None else args
        #: The command, where it is the first word; else all are offered.
        self._typed_command = typed[0] if typed and typed[0] in self.subcommands() else None
        super().__init__(model_class, datamodule_class, args=args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, and the arguments of their methods that come from the config."""
        ours = {name: {"model", "datamodule"} for name in _OURS}
        return {**LightningCLI.subcommands(), **ours}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._typed_command not in (None, subcommand):
            # Never looked at: all the options of the eleven other commands would take longer than the rest of parsing.
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # A command's own options first, before the hundreds of model, data and Trainer; nor all of them in the usage.
        groups: list[Any] = parser._action_groups  # type: ignore[assignment]
        groups.insert(groups.index(parser._optionals) + 1, groups.pop())
        parser.usage = f"lightning-bd {subcommand} {_USAGE.get(subcommand, '--config NAME_OR_FILE [options]')}"
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of the command or of a subcommand."""
        # A mistyped option must not pass as the abbreviation of another.
        parser = _Parser(**{**kwargs, "allow_abbrev": False})
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="A shipped config's name or the path of a YAML file."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to the command and not to model, data or trainer."""
        parser.add_argument("--fresh", action="store_true", help="Start over: rename the run's old folder.")
        parser.add_argument(
            "--override_trigger",
            "--override-trigger",
            action="store_true",
            help="Evaluate a checkpoint with the config's trigger although it was trained with another.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:  # type: ignore[override]
        """Parse the arguments, with the configs found and merged."""
        typed = list(sys.argv[1:] if args is None else args)
        with tempfile.TemporaryDirectory() as folder:
            self.config = parser.parse_args(expand_configs(typed, Path(folder)))

    def instantiate_trainer(self, **kwargs: Any) -> MultiPhaseTrainer:
        """Make the trainer and hand it what only the command line knows."""
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, MultiPhaseTrainer)
        subcommand = str(self.subcommand)
        config = self.config[subcommand]
        trainer.fresh = bool(config.get("fresh"))
        trainer.override_trigger = bool(config.get("override_trigger"))
        resolved = yaml.safe_load(self._parser(subcommand).dump(config, skip_none=False))
        if self._model_class is not BackdoorClassifier and "model" in resolved:
            path = f"{self._model_class.__module__}.{self._model_class.__qualname__}"
            resolved["model"] = {"class_path": path, "init_args": resolved["model"]}
        # The options of this one command are not the run's: other commands read the file too.
        shared = {name: resolved[name] for name in ("seed_everything", "model", "data", "trainer") if name in resolved}
        trainer.resolved_config = yaml.safe_dump(shared, sort_keys=False)
        return trainer

    def before_test(self) -> None:
        """Say so if it is the initial weights that are measured."""
        if not self.config[str(self.subcommand)].get("ckpt_path"):
            rank_zero_warn("No `--ckpt_path` is given: what is measured are the initial, untrained weights.")

    before_validate = before_predict = before_test

    def _parse_ckpt_path(self) -> None:
        # Lightning would merge the checkpoint's hyperparameters over the command line. Ours come from the config, and
        # the file is read where it is checked: in MultiPhaseTrainer.
        return


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-bd``.

    Args:
        args: The arguments; ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: With status 2 and a message if an argument, a file or the situation does not fit, 1 if training
            failed.
    """
    try:
        typed = expand_arguments(sys.argv[1:] if args is None else args)
        BackdoorCLI(
            model_class_of(typed),
            LightningDataModule,
            trainer_class=CommandTrainer,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"description": "Backdoor learning: train, make resilient, defend, measure."},
            args=typed,
        )
    except (MisconfigurationException, ValueError, FileNotFoundError) as error:
        _fail(error, 2)
    except (*_FAILED, OSError) as error:
        _fail(error, 1)


def model_class_of(args: Sequence[str]) -> type[LightningModule]:
    """Return the class that the configs of a command line name under ``model.class_path``.

    Args:
        args: Arguments of ``lightning-bd``, expanded.

    Returns:
        A LightningModule; :class:`BackdoorClassifier` if none is named.

    Raises:
        ConfigError: If there is no such class.
    """
    model = merged_config(split_configs(args)[0]).get("model")
    path = model.get("class_path") if isinstance(model, dict) else None
    if path is None:
        return BackdoorClassifier
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "lightning_bd.attacks"), name, None)
    except ImportError as error:
        raise ConfigError(f"Cannot import `model.class_path` {path}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ConfigError(f"Expected `model.class_path` to name a LightningModule, but {path} is none.")
    return found


def _fail(error: Exception, status: int) -> NoReturn:
    if os.environ.get("LIGHTNING_BD_TRACEBACK"):
        raise error
    expected = isinstance(error, _EXPECTED) or str(error).startswith("Expected ")
    hint = "" if expected else "\n(LIGHTNING_BD_TRACEBACK=1 shows where.)"
    sys.stderr.write(f"error: {_readable(str(error))}{hint}\n")
    raise SystemExit(status) from None


def _as_typed(message: str, args: list[str]) -> str:
    """Name options as they were typed; the parser of a nested option knows only the end of its name."""
    found = re.search(r"""Parser key "([\w.]+)":|unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is""", message)
    if found is None:
        return message
    end = next(group for group in found.groups() if group)
    typed = [name for name in (arg.partition("=")[0] for arg in args) if name.endswith(f".{end}")]
    return f"{typed[0]}: {message}" if typed else message


def _readable(message: str) -> str:
    """Keep the lines of a message that say what is wrong, each once."""
    kept: dict[str, None] = {}
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if text and not text.startswith(_NOISE):
            kept.setdefault(text if line.lstrip().startswith("- ") else line.rstrip())
    return "\n".join(kept) or message
