"""``python -m lightning_bd.reports RUN``: the figure of a run."""

import argparse
import sys
from pathlib import Path

from lightning_bd.reports.figures import plot_results


def main(args: list[str] | None = None) -> None:
    """Draw ``results.png`` beside a run's ``results.csv``.

    Args:
        args: The arguments; ``sys.argv[1:]`` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_bd.reports", description="Draw the figure of a run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("-o", "--output", type=Path, help="the PNG file; results.png in the run's folder by default")
    parser.add_argument("--title", default="", help="above the figure")
    arguments = parser.parse_args(args)
    figure = arguments.output or arguments.run / "results.png"
    try:
        plot_results(arguments.run / "results.csv", figure, arguments.title)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    sys.stdout.write(f"{figure}\n")


if __name__ == "__main__":
    main()
