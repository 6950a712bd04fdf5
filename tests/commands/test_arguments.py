"""Arguments as people type them."""

import re
from pathlib import Path

import pytest

from lightning_bd.commands.arguments import expand_arguments
from lightning_bd.config_files import ConfigError


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("fit --config a --fresh b", "fit --config a --fresh b"),
        ("defend --defenses a,b --config c", "defend --defenses=a,b --config c"),
        ("defend --config c --defenses a b c", "defend --config c --defenses=a,b,c"),
        ("defend --config c --defenses a,b c --fresh", "defend --config c --defenses=a,b,c --fresh"),
        ("defend --config c --defenses=a,b", "defend --config c --defenses=a,b"),
        ("interpolate a.ckpt b.ckpt -c x", "interpolate --first=a.ckpt --second=b.ckpt -c x"),
        ("interpolate -c x a.ckpt b.ckpt", "interpolate --first=a.ckpt --second=b.ckpt -c x"),
        ("interpolate -c x a.ckpt --points 5 b.ckpt", "interpolate --first=a.ckpt --second=b.ckpt -c x --points 5"),
        ("landscape --override-trigger a.ckpt -c=x", "landscape --ckpt_path=a.ckpt --override-trigger -c=x"),
        ("sharpness a.ckpt --rho=0.1 -c x", "sharpness --ckpt_path=a.ckpt --rho=0.1 -c x"),
        ("landscape --help", "landscape --help"),
        ("defend --print_config --ckpt_path a -c x", "defend --print_config --ckpt_path a -c x"),
    ],
)
def test_arguments_are_named(typed: str, wanted: str) -> None:
    assert expand_arguments(typed.split()) == wanted.split()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("landscape a.ckpt b.ckpt", "`landscape` takes 1 checkpoint, but got a.ckpt, b.ckpt"),
        ("interpolate a b c", "`interpolate` takes 2 checkpoints, but got a, b, c"),
        ("defend a.ckpt", "`defend` takes no positional argument, but got a.ckpt"),
        ("interpolate a -c x", "`interpolate` takes 2 checkpoints, but got 1"),
        ("sharpness -c x", "`sharpness` takes 1 checkpoint, but got 0"),
    ],
)
def test_too_many_are_refused(typed: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand_arguments(typed.split())


def test_the_config_of_the_run_that_the_checkpoint_lies_in(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "00_inject" / "final.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    without = ["landscape", f"--ckpt_path={checkpoint}"]
    with pytest.raises(ConfigError, match=r"lies in no run: .* `--config NAME_OR_FILE`"):
        expand_arguments(["landscape", str(checkpoint)])
    config = tmp_path / "run" / "config.yaml"
    config.touch()
    run = [f"--config={config}", f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_epochs=null"]
    assert expand_arguments(["landscape", str(checkpoint)]) == ["landscape", *run, *without[1:]]
    # A config that is named is the one.
    assert expand_arguments(["landscape", str(checkpoint), "-c", "mine"]) == [*without, "-c", "mine"]
    defend = ["defend", "--ckpt_path", str(checkpoint), "--defenses=ft"]
    assert expand_arguments(defend) == ["defend", *run, *defend[1:]]


def test_a_checkpoint_that_does_not_exist(tmp_path: Path) -> None:
    """Whether or not there is a run around it."""
    checkpoint = tmp_path / "run" / "00_inject" / "fnal.ckpt"
    for arguments in (["landscape", str(checkpoint)], ["defend", "--ckpt_path", str(checkpoint), "--defenses=ft"]):
        with pytest.raises(ConfigError, match=f"^There is no checkpoint {re.escape(str(checkpoint))}: the file does"):
            expand_arguments(arguments)
    checkpoint.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="the file does not exist"):
        expand_arguments(["landscape", str(checkpoint)])
