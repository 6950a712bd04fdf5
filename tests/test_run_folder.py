"""What a run leaves on disk, and which runs may go on in it."""

import csv
import json
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bd.run_folder import PhaseResult, RunFolder

PHASES = ("inject", "consolidate", "defend-ft")


def result(phase: str, **values: object) -> PhaseResult:
    row = PhaseResult(phase, "init", 0.9, 1.0, 0.0, epochs=2, seconds=1.5, steps=20)
    for name, value in values.items():
        setattr(row, name, value)
    return row


def finish(folder: RunFolder, name: str, **values: object) -> None:
    folder.start_phase(name, {}).finish(result(name, **values))


def open_run(root: Path, phases: dict[str, dict[str, object]] | None = None, seed: int = 1) -> RunFolder:
    phases = phases if phases is not None else {name: {"split": name} for name in PHASES}
    folder = RunFolder(root, list(phases))
    folder.open({"model": {"parameters": ["w (3,)"]}, "seed": seed}, phases)  # type: ignore[arg-type]
    return folder


def test_phases_are_numbered_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PHASES)
    assert [folder.phase(name).path.name for name in PHASES] == ["00_inject", "01_consolidate", "02_defend-ft"]
    assert folder.phase("inject").final == tmp_path / "00_inject" / "final.ckpt"
    assert folder.phase("inject").last == tmp_path / "00_inject" / "checkpoints" / "last.ckpt"
    assert list(tmp_path.iterdir()) == []


def test_a_phase_keeps_the_number_it_first_ran_with(tmp_path: Path) -> None:
    RunFolder(tmp_path, PHASES).start_phase("defend-ft", {})
    folder = RunFolder(tmp_path, ("inject", "more", *PHASES[1:]))
    assert folder.phase("defend-ft").path.name == "02_defend-ft"
    assert folder.phase("consolidate").path.name == "02_consolidate"


@pytest.mark.parametrize(("name", "other"), [("ft", "defend_ft"), ("a*", "abc"), ("a[b]", "ab"), ("?b", "ab")])
def test_a_name_finds_no_other_phases_folder(tmp_path: Path, name: str, other: str) -> None:
    folder = RunFolder(tmp_path, (other, name))
    finish(folder, other)
    assert folder.phase(name).result() is None
    finish(folder, name, epochs=7)
    assert [row.epochs for row in folder.results()] == [2, 7]


def test_a_result_survives_the_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PHASES)
    row = result("inject", attack_success_rate=None, note="lr 0.01", values={"learning_rate": 0.01})
    folder.start_phase("inject", {}).finish(row)
    assert folder.phase("inject").result() == row
    assert folder.phase("consolidate").result() is None
    assert folder.results() == [row]


def test_results_are_in_the_order_of_the_phases(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PHASES)
    for name in ("defend-ft", "inject"):
        finish(folder, name)
    assert [row.phase for row in folder.results()] == ["inject", "defend-ft"]


def test_finishing_removes_what_only_a_resume_needs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PHASES)
    here = folder.start_phase("inject", {})
    here.checkpoints.mkdir()
    here.last.touch()
    here.final.touch()
    here.finish(result("inject"))
    assert sorted(path.name for path in here.path.iterdir()) == ["final.ckpt", "phase.json", "result.json"]


def test_finishing_leaves_the_users_checkpoints(tmp_path: Path) -> None:
    here = RunFolder(tmp_path, PHASES).start_phase("inject", {})
    here.checkpoints.mkdir()
    (here.checkpoints / "best.ckpt").touch()
    here.last.touch()
    here.finish(result("inject"))
    assert [path.name for path in here.checkpoints.iterdir()] == ["best.ckpt"]


def test_rows_of_earlier_runs_are_kept_where_the_folder_collects(tmp_path: Path) -> None:
    finish(RunFolder(tmp_path, ["none", "ft"], collects=True), "none")
    finish(RunFolder(tmp_path, ["none", "ft"], collects=True), "ft")
    later = RunFolder(tmp_path, ["none", "anp", "nad"], collects=True)
    assert [row.phase for row in later.results()] == ["none", "ft"]
    # A new phase gets a number that no other has.
    assert later.phase("anp").path.name == "02_anp"
    finish(later, "anp")
    assert later.phase("nad").path.name == "03_nad"
    assert [row.phase for row in later.results()] == ["none", "ft", "anp"]
    assert [row.phase for row in RunFolder(tmp_path, ["none", "anp"]).results()] == ["none", "anp"]


def test_results_csv(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PHASES)
    finish(folder, "inject", note='lr 0.1, "odd"', values={"learning_rate": 0.1}, distance=1.25)
    finish(folder, "consolidate", attack_success_rate=None, robust_accuracy=None)
    folder.write_results()
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "phase": "inject", "start_from": "init", "clean_accuracy": "0.9", "attack_success_rate": "1.0",
        "attack_success_low": "", "attack_success_high": "", "robust_accuracy": "0.0",
        "defense_effectiveness_rating": "", "distance": "1.25", "epochs": "2", "seconds": "1.5", "steps": "20",
        "note": 'lr 0.1, "odd"',
    }  # fmt: skip
    assert (rows[1]["phase"], rows[1]["attack_success_rate"]) == ("consolidate", "")
    assert len(rows) == 2
    finish(folder, "defend-ft")
    folder.write_results()
    assert len((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["results.csv"]


def test_the_same_run_opens_again(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "deep" / "run")
    folder.start_phase("inject", {"split": "inject"})
    open_run(tmp_path / "deep" / "run")


def test_phases_may_be_added_and_changed_before_they_run(tmp_path: Path) -> None:
    open_run(tmp_path).start_phase("inject", {"split": "inject"})
    open_run(tmp_path, {"inject": {"split": "inject"}, "consolidate": {"split": "other"}, "more": {}})


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    open_run(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(
        MisconfigurationException,
        match=r"made with another configuration of this run:\n  seed: was 1, is 2\nGive another",
    ):
        open_run(tmp_path, seed=2)
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("left", ["checkpoints/last.ckpt", "final.ckpt", "result.json"])
def test_another_configuration_of_a_phase_that_began_is_refused(tmp_path: Path, left: str) -> None:
    folder = open_run(tmp_path).start_phase("inject", {"split": "inject", "max_epochs": 3})
    # Nothing was made with the old one yet.
    open_run(tmp_path, {"inject": {"split": "inject", "max_epochs": 4}})
    (folder.path / left).parent.mkdir(exist_ok=True)
    (folder.path / left).touch()
    with pytest.raises(MisconfigurationException, match=r"of phase `inject`:\n  max_epochs: was 3, is 4\nGive another"):
        open_run(tmp_path, {"inject": {"split": "inject", "max_epochs": 4}})


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    RunFolder(tmp_path, []).open({f"option{n:02d}": n for n in range(30)}, {})
    with pytest.raises(MisconfigurationException, match="option09") as error:
        RunFolder(tmp_path, []).open({f"option{n:02d}": -1 for n in range(30)}, {})
    assert "option10" not in str(error.value)


@pytest.mark.parametrize("file", ["run.json", "00_inject/phase.json", "00_inject/result.json"])
@pytest.mark.parametrize("content", [b"", b"{", b'["list"]', b"\xff\xfe"])
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    folder = open_run(tmp_path)
    folder.start_phase("inject", {"split": "inject"}).finish(result("inject"))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(MisconfigurationException, match=rf"Cannot read .*{file.rpartition('/')[2]}: .*`--fresh`"):
        open_run(tmp_path).results()


@pytest.mark.parametrize("content", ['{"phase": "inject"}', '{"unknown": 2}'])
def test_a_result_of_another_version_is_named(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path, PHASES)
    finish(folder, "inject")
    (tmp_path / "00_inject" / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(MisconfigurationException, match=r"Cannot read .*result\.json: .*argument"):
        folder.results()


def test_old_runs_are_renamed_and_kept(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert RunFolder(root, PHASES).rename_old() is None
    kept = []
    for number in range(3):  # also within one second
        root.mkdir()
        (root / "number").write_text(str(number), encoding="utf-8")
        (root / "run.json").write_text("{}", encoding="utf-8")
        target = RunFolder(root, PHASES).rename_old()
        assert target is not None
        assert target.name.startswith("run.old-")
        assert target.parent == tmp_path
        kept.append(target)
        assert not root.exists()
    assert [(path / "number").read_text(encoding="utf-8") for path in kept] == ["0", "1", "2"]


def test_descriptions_are_readable_json(tmp_path: Path) -> None:
    folder = open_run(tmp_path)
    folder.start_phase("inject", {"split": ["inject"], "max_epochs": 3})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["seed"] == 1
    assert json.loads((tmp_path / "00_inject" / "phase.json").read_text(encoding="utf-8"))["max_epochs"] == 3


def test_fresh_renames_runs_only(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"")
    with pytest.raises(MisconfigurationException, match=r"photos is none: it has no run\.json"):
        RunFolder(tmp_path / "photos", ["a"]).rename_old()
    assert (tmp_path / "photos" / "me.jpg").is_file()
