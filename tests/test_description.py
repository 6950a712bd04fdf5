"""Same arguments, same description; another argument, one line that names the place."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from lightning_bd.backbones import small_cnn
from lightning_bd.callbacks import ElasticWeightConsolidation, FineTuning, SharpnessAwareMinimization
from lightning_bd.classifier import BackdoorClassifier, Normalization
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.description import describe, differences
from lightning_bd.phase import Phase
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets, Blended


class Color(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Options:
    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")
    derived: int = field(default=0, init=False)


class Plain:
    """Keeps what it is given; other attributes are no arguments."""

    def __init__(self, strength: float, child: object = None) -> None:
        self.strength = strength
        self.child = child
        self.calls = 0


def from_config(lr: float, step_size: int = 5, rho: float = 0.05) -> Phase:
    """A phase as the command line makes it."""
    parser = LightningArgumentParser()
    parser.add_argument("--phases", type=dict[str, Phase])
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": step_size}}
    sam = {"class_path": "lightning_bd.callbacks.SharpnessAwareMinimization", "init_args": {"rho": rho}}
    config = parser.parse_object(
        {
            "phases": {
                "inject": {
                    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}},
                    "lr_scheduler": schedule,
                    "callbacks": [sam],
                }
            }
        }
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # jsonargparse before 4.49
    phase = instantiate(config).phases["inject"]
    assert isinstance(phase, Phase)
    return phase


def make_model(**changes: object) -> BackdoorClassifier:
    arguments: dict[str, object] = {"num_classes": 10} | changes
    backbone = small_cnn(int(str(arguments["num_classes"])), in_channels=1)
    return BackdoorClassifier(backbone, **arguments)  # type: ignore[arg-type]


def make_data(**changes: object) -> DigitsDataModule:
    poison = Poison(BadNets(size=2), rate=0.1, target=0)
    return DigitsDataModule(**{"poison": poison, "splits": {"inject": 1.0}, "batch_size": 32} | changes)  # type: ignore[arg-type]


Make = Callable[[], object]

# Two makers whose results differ in one place, and how the line about it begins.
PAIRS: dict[str, tuple[Make, Make, str]] = {
    "number": (lambda: {"rate": 0.1}, lambda: {"rate": 0.2}, "rate: was 0.1, is 0.2"),
    "nested": (lambda: {"a": [{"b": 1}]}, lambda: {"a": [{"b": 2}]}, "a.0.b: was 1, is 2"),
    "missing": (lambda: {"a": 1}, lambda: {"a": 1, "b": 2}, "b: was None, is 2"),
    "length": (lambda: {"a": (1, 2)}, lambda: {"a": (1,)}, r"a: was [1, 2], is [1]"),
    "set": (lambda: {"a": {"x", "y", "z"}}, lambda: {"a": {"x", "y"}}, "a: was ['x', 'y', 'z'], is ['x', 'y']"),
    "path": (lambda: {"p": Path("a")}, lambda: {"p": Path("b")}, "p: was 'a', is 'b'"),
    "dtype": (lambda: {"d": torch.float16}, lambda: {"d": torch.float32}, "d: was 'torch.float16', is 'torch.float32'"),
    "device": (lambda: {"d": torch.device("cpu")}, lambda: {"d": torch.device("meta")}, "d: was 'cpu', is 'meta'"),
    "time": (lambda: {"t": timedelta(1)}, lambda: {"t": timedelta(2)}, "t: was '1 day, 0:00:00', is '2 days, 0:00:00'"),
    "enum": (lambda: {"c": Color.RED}, lambda: {"c": Color.BLUE}, f"c: was '{__name__}.Color.RED', is '"),
    "class": (lambda: {"c": nn.ReLU}, lambda: {"c": nn.GELU}, "c: was 'torch.nn.modules.activation.ReLU', is '"),
    "tensor": (lambda: {"t": torch.zeros(2)}, lambda: {"t": torch.zeros(3)}, "t: was 'tensor(2,)', is 'tensor(3,)'"),
    "dataclass": (lambda: Options(0.1), lambda: Options(0.2), "rate: was 0.1, is 0.2"),
    "object": (lambda: Plain(1.0), lambda: Plain(2.0), "strength: was 1.0, is 2.0"),
    "object in object": (lambda: Plain(1, Plain(3)), lambda: Plain(1, Plain(4)), "child.strength: was 3, is 4"),
    "another class": (lambda: FineTuning(), lambda: Plain(1), "class: was 'lightning_bd.callbacks.defense"),
    "partial": (
        lambda: functools.partial(torch.optim.SGD, lr=0.1),
        lambda: functools.partial(torch.optim.SGD, lr=0.2),
        "lr: was 0.1, is 0.2",
    ),
    "partial's class": (
        lambda: functools.partial(torch.optim.SGD, lr=0.1),
        lambda: functools.partial(torch.optim.Adagrad, lr=0.1),
        "call.0: was 'torch.optim.sgd.SGD', is 'torch.optim.adagrad.Adagrad'",
    ),
    "partial's position": (
        lambda: functools.partial(max, 1),
        lambda: functools.partial(max, 2),
        "call.1: was 1, is 2",
    ),
    "jsonargparse's optimizer": (lambda: from_config(0.1), lambda: from_config(0.2), "optimizer.lr: was 0.1, is 0.2"),
    "jsonargparse's schedule": (
        lambda: from_config(0.1, step_size=5),
        lambda: from_config(0.1, step_size=6),
        "lr_scheduler.step_size: was 5, is 6",
    ),
    "jsonargparse's callback": (
        lambda: from_config(0.1),
        lambda: from_config(0.1, rho=0.1),
        "callbacks.0.rho: was 0.05, is 0.1",
    ),
    "module's argument": (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2), "p: was 0.1, is 0.2"),
    "normalisation": (
        lambda: make_model(normalize=Normalization([0.1], [1.0])),
        lambda: make_model(normalize=Normalization([0.2], [1.0])),
        "normalize.statistics.mean.0: was 0.1, is 0.2",
    ),
    "criterion": (
        lambda: make_model(criterion=nn.CrossEntropyLoss(label_smoothing=0.1)),
        lambda: make_model(),
        "criterion.label_smoothing: was 0.1, is 0.0",
    ),
    "trigger": (lambda: BadNets(2), lambda: BadNets(3), "size: was 2, is 3"),
    "poison": (lambda: Poison(BadNets(), 0.1), lambda: Poison(BadNets(), 0.2), "rate: was 0.1, is 0.2"),
    "datamodule": (lambda: make_data(), lambda: make_data(batch_size=64), "batch_size: was 32, is 64"),
    "datamodule's trigger": (
        lambda: make_data(),
        lambda: make_data(poison=Poison(BadNets(size=3), rate=0.1, target=0)),
        "poison.trigger.size: was 2, is 3",
    ),
    "fine-tuning": (lambda: FineTuning(max_drop=0.1), lambda: FineTuning(max_drop=0.2), "max_drop: was 0.1, is 0.2"),
    "candidates": (lambda: FineTuning([0.1, 0.2]), lambda: FineTuning([0.1, 0.3]), "learning_rates.1: was 0.2, is 0.3"),
    "sharpness": (
        lambda: SharpnessAwareMinimization(rho=0.1),
        lambda: SharpnessAwareMinimization(rho=0.2),
        "rho: was 0.1, is 0.2",
    ),
    "weight consolidation": (
        lambda: ElasticWeightConsolidation(strength=1.0),
        lambda: ElasticWeightConsolidation(strength=2.0),
        "strength: was 1.0, is 2.0",
    ),
    "Lightning's callback": (
        lambda: EarlyStopping("val/clean_accuracy", patience=3),
        lambda: EarlyStopping("val/clean_accuracy", patience=4),
        "patience: was 3, is 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_a_differing_argument_is_one_line_that_names_it(case: str) -> None:
    before, now, line = PAIRS[case]
    found = differences(describe(before()), describe(now()))
    assert len(found) == 1 or case in ("another class", "partial's class"), found
    assert found[0].startswith(line), found


@pytest.mark.parametrize("case", PAIRS)
def test_equal_arguments_are_equal_also_on_disk(case: str) -> None:
    make = PAIRS[case][0]
    one, other = describe(make()), describe(make())
    assert differences(one, other) == []
    assert differences(json.loads(json.dumps(one)), other) == []


def test_jsonargparses_wrappers_are_left_out() -> None:
    """Their names change from version to version, and a run must go on after an upgrade."""
    made = describe(from_config(0.1).optimizer)
    assert isinstance(made, dict)
    assert made["call"] == ["torch.optim.sgd.SGD"]


@pytest.mark.parametrize("callback", [ModelCheckpoint(), LearningRateMonitor(), Callback()])
def test_any_callback_is_described(callback: Callback) -> None:
    described = describe(callback)
    assert differences(described, json.loads(json.dumps(describe(copy.deepcopy(callback))))) == []


def test_a_module_is_described_by_its_parameters() -> None:
    found = differences(describe(make_model()), describe(make_model(num_classes=4)))
    assert "num_classes: was 10, is 4" in found
    assert any("(10, " in line and "(4, " in line for line in found)


def test_another_trigger_is_named_by_its_class() -> None:
    found = differences(describe(BadNets()), describe(Blended()))
    assert found[0] == (
        "class: was 'lightning_bd.triggers.badnets.BadNets', is 'lightning_bd.triggers.blended.Blended'"
    )


def test_what_happens_later_does_not_count() -> None:
    used, fresh = Plain(1.0), Plain(1.0)
    used.calls = 5
    trained, new = make_model(), make_model()
    with torch.no_grad():
        trained.backbone.get_parameter(next(iter(dict(trained.backbone.named_parameters())))).add_(1)
    loaded, untouched = make_data(), make_data()
    loaded.setup()
    for one, other in ((used, fresh), (trained, new), (loaded, untouched)):
        assert differences(describe(one), describe(other)) == []


def test_derived_fields_are_no_arguments() -> None:
    one, other = Options(), Options()
    other.derived = 9
    assert describe(one) == describe(other)
    assert describe(one) == {"class": f"{__name__}.Options", "rate": 0.1, "names": ["a", "b"]}


def test_long_values_are_cut_short() -> None:
    [line] = differences({"text": "a" * 500}, {"text": "b"})
    assert len(line) < 120
    assert line.endswith("..., is 'b'")


def test_layers_without_parameters_show() -> None:
    before = describe(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)))
    now = describe(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.2)))
    assert any(line.startswith("text_sha256: ") for line in differences(before, now))
