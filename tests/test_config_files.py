"""Configs: by name, strict, merged by the names of their phases."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_bd.config_files import ConfigError, expand_configs, find_config, read_config, shipped_configs


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def expand(folder: Path, *configs: str | Path, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the merged content of configs, given as texts or paths."""
    args = ["fit"]
    for number, config in enumerate(configs):
        path = config if isinstance(config, Path) else write(folder / f"config{number}.yaml", config)
        args += ["--config", str(path)]
    target = folder / "merged"
    target.mkdir(exist_ok=True)
    subcommand, option, *others = expand_configs([*args, *options], target)
    assert subcommand == "fit"
    assert others == list(options)
    assert option.startswith(f"--config={target}")
    merged = yaml.safe_load(Path(option.partition("=")[2]).read_text(encoding="utf-8"))
    assert isinstance(merged, dict)
    return merged


def test_shipped_configs_are_found_by_name() -> None:
    folder = Path(str(resources.files("lightning_bd.configs")))
    files = {path for path in folder.rglob("*") if path.suffix == ".yaml"}
    shipped, defenses, detectors = shipped_configs(), shipped_configs("defense"), shipped_configs("detection")
    attacks = shipped_configs("attack")
    assert {*shipped.values(), *attacks.values(), *defenses.values(), *detectors.values()} == files
    assert {path.parent for path in attacks.values()} == {folder / "attack"}
    assert attacks["attack/blended"] == folder / "attack" / "blended.yaml" == find_config("attack/blended")
    assert {path.parent for path in shipped.values()} == {folder}
    assert {path.parent for path in defenses.values()} == {folder / "defense"}
    assert {path.parent for path in detectors.values()} == {folder / "detection"}
    assert shipped["sbl_digits"] == folder / "sbl_digits.yaml" == find_config("sbl_digits")


def test_a_file_is_found_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(str(write(tmp_path / "mine.yaml", "a: 1"))) == tmp_path / "mine.yaml"
    assert find_config("mine.yaml") == Path("mine.yaml")


@pytest.mark.parametrize(("name", "guess"), [("sbl_digit", r"Did you mean `sbl_digits`\?"), ("nothing_like_it", "$")])
def test_an_unknown_name_lists_what_is_shipped(name: str, guess: str) -> None:
    with pytest.raises(ConfigError, match=rf"no config `{name}`: no such file, and shipped are .*sbl_digits.*{guess}"):
        find_config(name)


def test_a_config_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no config ``"):
        expand_configs(["fit", "--config"], tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "data: {batch_size: 1}\ndata: {batch_size: 2}",
        "data:\n  batch_size: 1\n  batch_size: 2",
        "trainer: {phases: {inject: {max_epochs: 1}, inject: {max_epochs: 2}}}",
        "a: [{b: {c: 1, c: 1}}]",
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "twice.yaml", text)
    with pytest.raises(ConfigError, match=r"Cannot read the config .*twice\.yaml: (?s:.*)the key `\w+` is given twice"):
        read_config(path)


def test_anchors_may_be_merged_and_overridden(tmp_path: Path) -> None:
    path = write(
        tmp_path / "anchors.yaml",
        "trainer:\n"
        "  phases:\n"
        "    one: &one {max_epochs: 1, split: a}\n"
        "    two: &two {<<: *one, split: b}\n"
        "    three: {<<: *two, max_epochs: 3}\n"
        "last: {<<: *two}\n",
    )
    config = read_config(path)
    assert config["trainer"]["phases"]["two"] == {"max_epochs": 1, "split": "b"}
    assert config["trainer"]["phases"]["three"] == {"max_epochs": 3, "split": "b"}
    assert config["last"] == {"max_epochs": 1, "split": "b"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E4", 50000.0),
        ("-1e3", -1000.0),
        (".5e1", 5.0),
        ("1.5e-3", 0.0015),
        ("1e", "1e"),
        ("e3", "e3"),
    ],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, value: object) -> None:
    assert read_config(write(tmp_path / "number.yaml", f"lr: {text}\nquoted: '1e-3'")) == {
        "lr": value,
        "quoted": "1e-3",
    }


@pytest.mark.parametrize(
    ("option", "guess"),
    [
        ("max_epoch", r"Did you mean `max_epochs`\?"),
        ("spilt", r"Did you mean `split`\?"),
        ("zzz", "Known are name, split, poisoned"),
    ],
)
def test_an_unknown_option_of_a_phase(tmp_path: Path, option: str, guess: str) -> None:
    path = write(tmp_path / "typo.yaml", f"trainer: {{phases: {{inject: {{{option}: 3}}}}}}")
    with pytest.raises(ConfigError, match=rf"Phase `inject` in .*typo\.yaml: there is no option `{option}`\. ?{guess}"):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {phases: [{name: inject}]}", r"`trainer\.phases` must map names to phases"),
        ("trainer: {phases: {inject: 3}}", r"Phase `inject` in .*: expected options such as `max_epochs`, but got 3"),
        ("trainer: {phases: {inject: }}", r"Phase `inject` in .*: expected options .* but got None"),
        ("trainer: 3", r"bad\.yaml: `trainer` must be a mapping, but is 3"),
        ("- a\n- b", r"The config .*bad\.yaml is not a mapping"),
        ("", r"The config .*bad\.yaml is not a mapping"),
        ("a: [1", r"Cannot read the config .*bad\.yaml: "),
        ("a: !!python/object/apply:os.getcwd []", r"Cannot read the config .*bad\.yaml: (?s:.*)could not determine"),
        ("? [1, 2]\n: 3", r"Cannot read the config .*bad\.yaml: "),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path / "bad.yaml", text))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"Cannot read the config .*bad\.yaml: "):
        read_config(path)


def test_phases_are_merged_by_name(tmp_path: Path) -> None:
    first = "trainer: {devices: 1, phases: {inject: {split: a, max_epochs: 9}, consolidate: {max_epochs: 5}}}"
    second = "trainer: {phases: {defend: {max_epochs: 7}, inject: {max_epochs: 1}}}"
    merged = expand(tmp_path, first, second)
    assert merged["trainer"]["devices"] == 1
    assert merged["trainer"]["phases"] == {
        "inject": {"split": "a", "max_epochs": 1}, "consolidate": {"max_epochs": 5}, "defend": {"max_epochs": 7},
    }  # fmt: skip
    assert list(merged["trainer"]["phases"]) == ["inject", "consolidate", "defend"]


def test_lists_are_replaced_and_the_last_config_wins(tmp_path: Path) -> None:
    merged = expand(tmp_path, "a: [1, 2]\nb: {c: 1}\nd: 1", "a: [3]\nb: 5", "b: {e: 1}\nd: null")
    assert merged | {"trainer": None} == {"a": [3], "b": {"e": 1}, "d": None, "trainer": None}


def test_another_class_drops_the_arguments_of_the_first(tmp_path: Path) -> None:
    first = "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1, momentum: 0.9}}"
    other = expand(tmp_path, first, "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 2}}")
    assert other["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 2}}
    bare = expand(tmp_path, first, "optimizer: {class_path: torch.optim.Adam}")
    assert bare["optimizer"] == {"class_path": "torch.optim.Adam"}
    for second in ("{class_path: torch.optim.SGD, init_args: {lr: 2}}", "{init_args: {lr: 2}}"):
        same = expand(tmp_path, first, f"optimizer: {second}")
        assert same["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": {"lr": 2, "momentum": 0.9}}


def test_the_default_folder_is_named_after_the_first_config(tmp_path: Path) -> None:
    first, second = write(tmp_path / "mine.yaml", "a: 1"), write(tmp_path / "more.yaml", "b: 1")
    assert expand(tmp_path, first, second)["trainer"] == {"default_root_dir": str(Path("runs") / "mine")}


@pytest.mark.parametrize("text", ["trainer:", "trainer: {}", "trainer: null", "trainer: {phases: }"])
def test_an_empty_trainer_gets_the_default_folder(tmp_path: Path, text: str) -> None:
    merged = expand(tmp_path, write(tmp_path / "mine.yaml", text))
    assert merged["trainer"]["default_root_dir"] == str(Path("runs") / "mine")


def test_a_later_empty_trainer_is_no_end_of_the_first(tmp_path: Path) -> None:
    assert expand(tmp_path, "trainer: {devices: 1}", "trainer:")["trainer"]["devices"] == 1


def test_a_folder_in_the_config_stays(tmp_path: Path) -> None:
    assert expand(tmp_path, "trainer: {default_root_dir: here}")["trainer"]["default_root_dir"] == "here"


def test_options_stay_behind_the_config(tmp_path: Path) -> None:
    options = ("--trainer.max_epochs", "3", "--data.batch_size=5", "--fresh")
    assert expand(tmp_path, "a: 1", options=options)["a"] == 1


@pytest.mark.parametrize(
    "form", [["--config=sbl_digits"], ["--config", "sbl_digits"], ["-c", "sbl_digits"], ["-c=sbl_digits"]]
)
def test_all_ways_to_give_a_config(tmp_path: Path, form: list[str]) -> None:
    [subcommand, option] = expand_configs(["fit", *form], tmp_path)
    assert (subcommand, option) == ("fit", f"--config={tmp_path / 'sbl_digits.yaml'}")


def test_without_a_config_nothing_changes(tmp_path: Path) -> None:
    for args in ([], ["--help"], ["fit", "--help"], ["test", "--ckpt_path", "a.ckpt"]):
        assert expand_configs(args, tmp_path) == args
    assert list(tmp_path.iterdir()) == []


def test_the_subcommand_comes_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The subcommand comes first: lightning-bd fit --config sbl_digits"):
        expand_configs(["--fresh", "fit", "--config", "sbl_digits"], tmp_path)
    assert expand_configs(["--config", "sbl_digits", "fit"], tmp_path)[0] == "fit"


def test_an_attack_changes_a_config_and_names_the_folder(tmp_path: Path) -> None:
    merged = expand(tmp_path, Path("badnets_digits"), Path("attack/blended"))
    assert merged["data"]["init_args"]["poison"]["trigger"]["class_path"] == "lightning_bd.triggers.Blended"
    assert "size" not in merged["data"]["init_args"]["poison"]["trigger"].get("init_args", {})
    assert merged["data"]["class_path"] == "lightning_bd.datamodules.DigitsDataModule"
    assert merged["trainer"]["default_root_dir"] == "runs/badnets_digits-blended"


def test_an_attack_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`attack/blended` says how to poison and nothing else"):
        expand(tmp_path, Path("attack/blended"))


def test_the_models_class_is_told_apart_from_its_arguments(tmp_path: Path) -> None:
    merged = expand(
        tmp_path,
        "model: {num_classes: 3, channels_last: false}",
        "model: {class_path: some.Model, init_args: {channels_last: true}}",
    )
    assert merged["model"] == {"num_classes": 3, "channels_last": True}


def test_a_later_config_overrides_the_models_arguments_in_either_form(tmp_path: Path) -> None:
    named = "model: {class_path: some.Model, init_args: {lr: 1, width: 3}}"
    assert expand(tmp_path, named, "model: {lr: 2}")["model"] == {"lr": 2, "width": 3}
    assert expand(tmp_path, "model: {lr: 2}", named)["model"] == {"lr": 1, "width": 3}


def test_an_attack_keeps_nothing_of_the_poison_before_it(tmp_path: Path) -> None:
    """Or labels would be kept, and images chosen, that the attack's config says nothing of."""
    for name in shipped_configs("attack"):
        poison = expand(tmp_path, Path("wicked_oddities_cifar10_small"), Path(name))["data"]["init_args"]["poison"]
        alone = yaml.safe_load(find_config(name).read_text())["data"]["init_args"]["poison"]
        kept = {key for key in poison if key not in alone}
        # A clean-label attacker may choose its images as before.
        assert kept <= ({"selection"} if alone["clean_label"] else set()) | {"trigger"}, name
        assert "trigger" in alone or name == "attack/precomputed"
        assert {"rate", "target", "mode", "cover_rate", "cover_classes", "crafting"} <= set(alone)
