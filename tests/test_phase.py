"""The tree that phases form, and what is refused before anything runs."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_bd.batch import PoisonMode
from lightning_bd.callbacks import FineTuning
from lightning_bd.phase import INIT, Phase, check_phase, in_order, name_phases, phase_parents


def tree(**start_from: str | None) -> dict[str, Phase]:
    return name_phases({name: Phase(start_from=parent) for name, parent in start_from.items()})


def test_without_start_from_phases_form_a_chain() -> None:
    assert phase_parents(tree(a=None, b=None, c=None)) == {"a": INIT, "b": "a", "c": "b"}


def test_branches_and_baselines() -> None:
    parents = phase_parents(
        tree(inject=None, consolidate=None, plain="init", ft="consolidate", nad="consolidate", last=None)
    )
    assert parents == {
        "inject": INIT,
        "consolidate": "inject",
        "plain": INIT,
        "ft": "consolidate",
        "nad": "consolidate",
        "last": "nad",
    }


def test_parents_run_before_children_else_as_listed() -> None:
    parents = phase_parents(tree(ft="consolidate", a="init", consolidate="inject", inject="init", b=None))
    assert in_order(parents) == ["a", "inject", "consolidate", "ft", "b"]
    assert in_order(phase_parents(tree(a=None, b="init", c="a"))) == ["a", "b", "c"]
    assert in_order({}) == []


def test_an_unknown_start() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"Phase `b`: `start_from` names `x`, which is none of the phases \(a, b\) nor `init`",
    ):
        phase_parents(tree(a=None, b="x"))


@pytest.mark.parametrize(
    ("start_from", "circle"),
    [
        ({"a": "a"}, "a from a"),
        ({"a": "b", "b": "a"}, "a from b from a"),
        ({"a": "c", "b": "a", "c": "b"}, "a from c from b from a"),
        ({"x": None, "a": "b", "b": "c", "c": "b"}, "a from b from c from b"),
    ],
)
def test_circles(start_from: dict[str, str | None], circle: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"Phase `a`: `start_from` goes in a circle: {circle}\."):
        phase_parents(tree(**start_from))


def test_names_come_from_the_mapping_or_the_list() -> None:
    phase = Phase(split="inject")
    named = name_phases({"inject": phase})
    assert named["inject"].name == "inject"
    assert named["inject"].split == "inject"
    assert phase.name is None, "the given phase is not changed"
    assert list(name_phases([Phase("b"), Phase("a")])) == ["b", "a"]
    assert name_phases({"a": Phase("a")})["a"].name == "a"


@pytest.mark.parametrize("name", ["", INIT, "a/b", ".hidden", "..", None])
def test_bad_names(name: str | None) -> None:
    with pytest.raises(MisconfigurationException, match="the name must not be empty, `init` or a path"):
        name_phases([Phase(name)])
    if name is not None:
        with pytest.raises(MisconfigurationException, match="the name must not be empty, `init` or a path"):
            name_phases({name: Phase()})


def test_repeated_names() -> None:
    with pytest.raises(MisconfigurationException, match="Phase `a`: the name is used twice"):
        name_phases([Phase("a"), Phase("b"), Phase("a")])


def test_two_names() -> None:
    with pytest.raises(MisconfigurationException, match="Phase `a`: its `name` is `b`; leave `name` out"):
        name_phases({"a": Phase("b")})


@pytest.mark.parametrize(
    ("phase", "defends"),
    [
        (Phase("inject", split="inject"), False),
        (Phase("inject", split=["inject", "defend"]), False),
        (Phase("x", split="defend"), True),
        (Phase("x", split=["defend"]), True),
        (Phase("defend-ft"), True),
        (Phase("x", callbacks=[Callback(), FineTuning()]), True),
        (Phase("x", callbacks=[Callback()]), False),
        (Phase(), False),
    ],
)
def test_what_defends(phase: Phase, defends: bool) -> None:
    assert phase.defends is defends


@pytest.mark.parametrize(("split", "splits"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b"))])
def test_splits(split: str | list[str] | None, splits: tuple[str, ...]) -> None:
    assert Phase(split=split).splits == splits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_clip": 1}, r"Phase `a`: `trainer\.gradient_clip` is not an argument of Trainer"),
        ({"self": 1}, r"`trainer\.self` is not an argument"),
        ({"callbacks": []}, r"`trainer\.callbacks` cannot be set here; use the phase's `callbacks`"),
        ({"max_epochs": 3}, r"`trainer\.max_epochs` cannot be set here; use the phase's `max_epochs`"),
        ({"logger": False}, r"`trainer\.logger` cannot be set here; it is the run's to choose"),
        ({"default_root_dir": "x"}, r"`trainer\.default_root_dir` cannot be set here; it is the run's to choose"),
    ],
)
def test_trainer_arguments(arguments: dict[str, Any], message: str) -> None:
    phase = Phase("a", trainer=arguments)
    with pytest.raises(MisconfigurationException, match=message):
        check_phase(phase, {"a": phase})


def test_a_scheduler_needs_an_optimizer() -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    phase = Phase("a", lr_scheduler=schedule)
    with pytest.raises(MisconfigurationException, match="Phase `a`: `lr_scheduler` needs an `optimizer` beside it"):
        check_phase(phase, {"a": phase})
    check_phase(Phase("a", optimizer=partial(torch.optim.SGD, lr=1), lr_scheduler=schedule), {})


@pytest.mark.parametrize("poisoned", [True, "static", "dynamic"])
@pytest.mark.parametrize("reason", [{"split": "defend"}, {"name": "defend-ft"}, {"callbacks": [FineTuning()]}])
def test_a_defense_is_not_poisoned(poisoned: bool | PoisonMode, reason: dict[str, Any]) -> None:
    phase = Phase(**{"name": "a", "poisoned": poisoned, **reason})
    with pytest.raises(
        MisconfigurationException, match=r"defends \(by its name, split or a defense\), so it cannot be `poi"
    ):
        check_phase(phase, {"a": phase})


def test_callbacks_are_not_shared() -> None:
    callback = Callback()
    phases = {"a": Phase("a", callbacks=[callback]), "b": Phase("b", callbacks=[Callback(), callback])}
    with pytest.raises(
        MisconfigurationException, match="Phases `a` and `b` share a callback object; give each its own"
    ):
        check_phase(phases["a"], phases)
    phases["b"].callbacks = [copy.copy(callback)]
    check_phase(phases["a"], phases)


def test_what_is_right_passes() -> None:
    phase = Phase("a", split="inject", poisoned="static", trainer={"gradient_clip_val": 1.0, "precision": "bf16-mixed"})
    check_phase(phase, {"a": phase})


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase("a", batch_size=0), r"`a`: `batch_size` must be positive, not 0"),
        (Phase("a", max_epochs=-1), r"`a`: `max_epochs` must be 0 or more, not -1"),
    ],
)
def test_sizes_are_checked(phase: Phase, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        check_phase(phase, {"a": phase})
