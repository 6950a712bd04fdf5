"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_bd.run_folder import PhaseResult

__all__ = ("print_metrics", "print_results", "results_table", "wide_console")


def results_table(results: Sequence[PhaseResult], title: str = "Test set, after each phase") -> Table:
    """Lay out one row per phase: clean accuracy, ASR and robust accuracy in percent, epochs, seconds.

    Where a phase defended, also the defense effectiveness rating, the ASR's 95 % interval and the distance moved.

    Args:
        results: The finished phases, in order.
        title: Above the table.
    """
    defended = any(row.defends or not row.applied for row in results)
    several = len({row.start_from for row in results}) > 2
    table = Table(title=title)
    table.add_column("phase")
    if several or not defended:
        table.add_column("from")
    for name in ("clean acc. %", "ASR %", "robust acc. %"):
        table.add_column(name, justify="right")
    for name in ("DER %", "L2 moved") if defended else ():
        table.add_column(name, justify="right")
    for name in ("epochs", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for row in results:
        cells = [row.phase, *([row.start_from] if several or not defended else [])]
        if row.applied:
            success = _percent(row.attack_success_rate)
            if defended and row.attack_success_low is not None:
                success += f" ({_percent(row.attack_success_low)}-{_percent(row.attack_success_high)})"
            cells += [_percent(row.clean_accuracy), success, _percent(row.robust_accuracy)]
            if defended:
                # What is no defense, and the undefended model, has no rating.
                unrated = row.defense_effectiveness_rating is None and row.attack_success_rate is not None
                cells.append("" if unrated else _percent(row.defense_effectiveness_rating))
                cells.append("unknown" if row.distance is None else f"{row.distance:.2f}")
            cells += [str(row.epochs), f"{row.seconds:.1f}"]
        else:
            cells += [""] * (len(table.columns) - 1 - len(cells))
        table.add_row(*cells, Text(row.note))
    return table


def _percent(rate: float | None) -> str:
    return "unknown" if rate is None else f"{100 * rate:.1f}"


def wide_console() -> Console:
    """Return the terminal; a log file is not a narrow one, and gets the room that a table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print one row per metric, in percent.

    Args:
        metrics: Name -> rate in [0, 1].
    """
    table = Table("metric", "%")
    for name, value in metrics.items():
        table.add_row(name, f"{100 * value:.2f}")
    Console().print(table)


def print_results(results: Sequence[PhaseResult], folder: Path, title: str = "Test set, after each phase") -> None:
    """Print the table and where the run is.

    Args:
        results: The finished phases, in order.
        folder: The run's folder.
        title: Above the table.
    """
    console = wide_console()
    console.print(results_table(results, title))
    console.print(f"Results, checkpoints and TensorBoard logs: {folder}", soft_wrap=True, markup=False)
