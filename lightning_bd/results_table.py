"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_bd.run_folder import PhaseResult

__all__ = ("print_metrics", "print_results", "results_table")


def results_table(results: Sequence[PhaseResult]) -> Table:
    """Lay out one row per phase: clean accuracy, ASR and robust accuracy in percent, epochs, seconds.

    Args:
        results: The finished phases, in order.
    """
    table = Table(title="Test set, after each phase")
    for name in ("phase", "from"):
        table.add_column(name)
    for name in ("clean acc. %", "ASR %", "robust acc. %", "epochs", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for row in results:
        rates = (row.clean_accuracy, row.attack_success_rate, row.robust_accuracy)
        shown = ["unknown" if rate is None else f"{100 * rate:.1f}" for rate in rates]
        table.add_row(row.phase, row.start_from, *shown, str(row.epochs), f"{row.seconds:.1f}", Text(row.note))
    return table


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print one row per metric, in percent.

    Args:
        metrics: Name -> rate in [0, 1].
    """
    table = Table("metric", "%")
    for name, value in metrics.items():
        table.add_row(name, f"{100 * value:.2f}")
    Console().print(table)


def print_results(results: Sequence[PhaseResult], folder: Path) -> None:
    """Print the table and where the run is.

    Args:
        results: The finished phases, in order.
        folder: The run's folder.
    """
    console = Console()
    # A log file is not a narrow terminal: give the table the room it needs.
    if not console.is_terminal:
        console = Console(width=120)
    console.print(results_table(results))
    console.print(f"Results, checkpoints and TensorBoard logs: {folder}", soft_wrap=True, markup=False)
