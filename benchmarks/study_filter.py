"""Detect, drop, retrain: what is left of a backdoor when suspicious training images are left out.

Trains one phase of a config with a static poison, filters its training images with each detector, and trains the phase
again without them, over several seeds. Prints a Markdown table. Resumable: the same command continues.

    python benchmarks/study_filter.py --config sbl_digits --phase cbl --detectors scan strip cd --keep 0.85
"""

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from _tables import mean_and_deviation, print_markdown

from lightning_bd.cli import main as lightning_bd
from lightning_bd.config_files import find_config, read_config
from lightning_bd.reports.figures import read_rows


def caught(folder: Path, detector: str, excluded: set[int]) -> tuple[float, float]:
    """Return the shares of the poisoned and of the clean training images that are left out."""
    table = pq.read_table(folder / "parts" / detector / "train.parquet")
    rows = list(zip(table["index"].to_pylist(), table["positive"].to_pylist(), strict=True))
    shares = [[index in excluded for index, positive in rows if positive is wanted] for wanted in (True, False)]
    return sum(shares[0]) / len(shares[0]), sum(shares[1]) / len(shares[1])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="sbl_digits")
    parser.add_argument("--phase", default="cbl", help="poisoned: static, and starting from the initial weights")
    parser.add_argument("--detectors", nargs="+", default=["scan", "strip", "cd"])
    parser.add_argument("--keep", type=float, default=0.85)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/study_filter"))
    parser.add_argument(
        "--overrides", nargs=argparse.REMAINDER, default=[], help="last: further arguments, such as --data.root=FOLDER"
    )
    arguments = parser.parse_args()
    config = read_config(find_config(arguments.config))
    config["trainer"]["phases"] = {arguments.phase: config["trainer"]["phases"][arguments.phase]}
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("none", *arguments.detectors)}
    for seed in arguments.seeds:
        given = ["--config", str(file), "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false",
                 *arguments.overrides]  # fmt: skip
        first = arguments.output / f"seed{seed}" / "attacked"
        for name in found:
            folder = first.with_name(name) if name != "none" else first
            root = ["--trainer.default_root_dir", str(folder)]
            shares: tuple[float, ...] = (0.0, 0.0)
            if name == "none":
                lightning_bd(["fit", *given, *root])
            else:
                (checkpoint,) = first.glob(f"[0-9][0-9]_{arguments.phase}/final.ckpt")
                excluded = first.with_name(f"{name}.json")
                lightning_bd([
                    "filter", *given, "--trainer.default_root_dir", str(first), "--ckpt_path", str(checkpoint),
                    "--detector", name, "--keep", str(arguments.keep), "--output", str(excluded),
                ])  # fmt: skip
                left_out = set(json.loads(excluded.read_text())["excluded"])
                shares = caught(first / "score" / checkpoint.parent.name, name, left_out)
                lightning_bd(["fit", *given, *root, "--data.exclude", str(excluded)])
            (row,) = [row for row in read_rows(folder / "results.csv") if row["phase"] == arguments.phase]
            found[name].append((*shares, float(row["clean_accuracy"]), float(row["attack_success_rate"])))
    print(f"\n{arguments.config}, phase {arguments.phase}, {1 - arguments.keep:.0%} left out,"
          f" mean ± standard deviation of {len(arguments.seeds)} seeds\n")  # fmt: skip
    table = [
        [name, *(mean_and_deviation([100 * value for value in column]) for column in zip(*rows, strict=True))]
        for name, rows in found.items()
    ]
    print_markdown(["detector", "poisoned left out %", "clean left out %", "clean accuracy %", "ASR %"], table)


if __name__ == "__main__":
    main()
