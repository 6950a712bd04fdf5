"""Every shipped defense against the models of a config, over several seeds.

Trains the config once per seed, without its own defending phases, and runs `lightning-bd defend` on the final model of
each phase that is named. Prints one Markdown table per phase. Resumable: the same command continues.

    python benchmarks/study_defenses.py --config sbl_digits --phases cbl consolidate --seeds 1 2 3
"""

import argparse
from pathlib import Path

import yaml
from _tables import mean_and_deviation, print_markdown

from lightning_bd.cli import main as lightning_bd
from lightning_bd.commands.defend import UNDEFENDED, load_defenses
from lightning_bd.config_files import find_config, read_config
from lightning_bd.reports.figures import read_rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="sbl_digits")
    parser.add_argument("--phases", nargs="+", default=["cbl", "consolidate"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--defenses", nargs="+", default=["all"])
    parser.add_argument("--output", type=Path, default=Path("runs/study_defenses"))
    parser.add_argument(
        "--overrides", nargs=argparse.REMAINDER, default=[], help="last: further arguments, such as --data.root=FOLDER"
    )
    arguments = parser.parse_args()
    names = [UNDEFENDED, *load_defenses(arguments.defenses)]
    config = read_config(find_config(arguments.config))
    phases = config["trainer"]["phases"]
    config["trainer"]["phases"] = {name: phase for name, phase in phases.items() if not name.startswith("defend")}
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for seed in arguments.seeds:
        folder = arguments.output / f"seed{seed}"
        given = ["--config", str(file), "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder),
                 "--trainer.enable_progress_bar", "false", *arguments.overrides]  # fmt: skip
        lightning_bd(["fit", *given])
        for phase in arguments.phases:
            (checkpoint,) = folder.glob(f"[0-9][0-9]_{phase}/final.ckpt")
            lightning_bd(["defend", *given, "--ckpt_path", str(checkpoint), "--defenses", *arguments.defenses])
            for row in read_rows(folder / "defend" / checkpoint.parent.name / "results.csv"):
                found.setdefault((phase, row["phase"]), []).append(row)
    columns = {
        "clean accuracy %": ("clean_accuracy", 100.0), "ASR %": ("attack_success_rate", 100.0),
        "robust accuracy %": ("robust_accuracy", 100.0), "DER %": ("defense_effectiveness_rating", 100.0),
        "L2 moved": ("distance", 1.0), "seconds": ("seconds", 1.0),
    }  # fmt: skip
    for phase in arguments.phases:
        print(f"\n{phase}: mean ± standard deviation of {len(arguments.seeds)} seeds\n")
        table = []
        for name in names:
            rows = found.get((phase, name), [])
            values = [
                mean_and_deviation([scale * float(row[column]) for row in rows if row[column]])
                for column, scale in columns.values()
            ]
            table.append([name, *values])
        print_markdown(["defense", *columns], table)


if __name__ == "__main__":
    main()
