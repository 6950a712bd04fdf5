"""The table at the end of a run."""

from pathlib import Path

import pytest
from rich.console import Console

from lightning_bd.results_table import print_metrics, print_results, results_table
from lightning_bd.run_folder import PhaseResult

ROWS = [
    PhaseResult("inject", "init", 0.9876, 1.0, 0.004, epochs=30, seconds=12.34, steps=300),
    PhaseResult("defend-ft", "inject", 0.5, None, None, epochs=50, seconds=0.0, steps=300, note="lr 0.01"),
]


def cells(text: str, first: str) -> list[str]:
    """The cells of the printed row that begins with a word."""
    row = next(line for line in text.splitlines() if line.strip("│ ┃").startswith(first))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_one_row_per_phase_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=200).print(results_table(ROWS))
    text = capsys.readouterr().out
    assert cells(text, "inject") == ["inject", "init", "98.8", "100.0", "0.4", "30", "12.3", ""]
    assert cells(text, "defend-ft") == ["defend-ft", "inject", "50.0", "unknown", "unknown", "50", "0.0", "lr 0.01"]


def test_defenses_are_rated_against_the_model_they_started_from(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        PhaseResult("none", "init", 0.9, 1.0, 0.0, 0, 0.0, 0, attack_success_low=0.98, attack_success_high=1.0),
        PhaseResult(
            "ft", "none", 0.89, 0.25, 0.7, 50, 9.0, 0, "lr 0.1", {}, 0.2, 0.3,
            defense_effectiveness_rating=0.87, distance=1.234, defends=True,
        ),
        PhaseResult("clp", "none", None, None, None, 0, 0.0, 0, "not applicable: no BatchNorm", applied=False),
        PhaseResult("nad", "none", 0.89, None, None, 20, 1.0, 0, distance=0.5),
    ]  # fmt: skip
    Console(width=200).print(results_table(rows))
    text = capsys.readouterr().out
    assert cells(text, "none") == ["none", "90.0", "100.0 (98.0-100.0)", "0.0", "", "unknown", "0", "0.0", ""]
    assert cells(text, "ft") == ["ft", "89.0", "25.0 (20.0-30.0)", "70.0", "87.0", "1.23", "50", "9.0", "lr 0.1"]
    assert cells(text, "clp") == ["clp", "", "", "", "", "", "", "", "not applicable: no BatchNorm"]
    assert cells(text, "nad") == ["nad", "89.0", "unknown", "unknown", "unknown", "0.50", "20", "1.0", ""]


def test_a_file_gets_room_and_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs") / ("long_" * 40)
    print_results(ROWS, folder)
    text = capsys.readouterr().out
    assert cells(text, "defend-ft")[-1] == "lr 0.01"
    assert str(folder) in text


def test_notes_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    row = PhaseResult("a", "init", 1.0, 1.0, 0.0, 1, 1.0, 1, note="[bold]x[/bold] [/]")
    print_results([row], Path("[red]"))
    text = capsys.readouterr().out
    assert "[bold]x[/bold] [/]" in text
    assert text.rstrip().endswith(": [red]")


def test_metrics_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    print_metrics({"test/clean_accuracy": 0.98765, "test/attack_success_rate": 1.0})
    text = capsys.readouterr().out
    assert cells(text, "test/clean_accuracy") == ["test/clean_accuracy", "98.77"]
    assert cells(text, "test/attack_success_rate") == ["test/attack_success_rate", "100.00"]
