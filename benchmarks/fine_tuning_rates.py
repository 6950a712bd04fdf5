"""Attack success after fine-tuning over its learning rate, conventional against resilient backdoor.

The models of a shipped config, several seeds; each is fine-tuned once per learning rate. Writes a CSV and a figure,
prints the table. Resumable: the same command continues.

    python benchmarks/fine_tuning_rates.py --config sbl_digits --seeds 1 2 3 --output runs/fine_tuning_rates
"""

import argparse
import csv
import statistics
from pathlib import Path

import yaml

from lightning_bd.cli import main as lightning_bd
from lightning_bd.config_files import find_config, read_config
from lightning_bd.reports.figures import plot_learning_rates, read_rows

MODELS = {"cbl": "conventional (CBL)", "consolidate": "resilient (SAM + EWC)"}


def study_config(name: str, rates: list[float], epochs: int) -> dict[str, object]:
    """Return the config with its defending phases replaced by one per model and learning rate."""
    config = read_config(find_config(name))
    phases = config["trainer"]["phases"]
    defense = next(phase for key, phase in phases.items() if key.startswith("defend-ft"))
    kept = {key: phase for key, phase in phases.items() if not key.startswith("defend")}
    for rate in rates:
        for model in MODELS:
            kept[f"defend-{model}-lr{rate:g}"] = {
                **defense,
                "start_from": model,
                "callbacks": [
                    {
                        "class_path": "lightning_bd.callbacks.FineTuning",
                        "init_args": {"learning_rates": [rate], "max_epochs": epochs},
                    }
                ],
            }
    config["trainer"]["phases"] = kept
    return config


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="sbl_digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("runs/fine_tuning_rates"))
    parser.add_argument(
        "--overrides", nargs=argparse.REMAINDER, default=[], help="last: further arguments, such as --data.root=FOLDER"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "config.yaml"
    file.write_text(yaml.safe_dump(study_config(arguments.config, arguments.rates, arguments.epochs), sort_keys=False))
    rows: list[dict[str, str]] = []
    for seed in arguments.seeds:
        folder = arguments.output / f"seed{seed}"
        lightning_bd(
            ["fit", "--config", str(file), "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder),
             "--trainer.enable_progress_bar", "false", *arguments.overrides]
        )  # fmt: skip
        for row in read_rows(folder / "results.csv"):
            _, _, rest = row["phase"].partition("defend-")
            model, marker, rate = rest.partition("-lr")
            if marker:
                rates = {name: row[name] for name in ("clean_accuracy", "attack_success_rate")}
                rows.append({"model": MODELS[model], "learning_rate": rate, "seed": str(seed), **rates})
    with (arguments.output / "study.csv").open("w", newline="") as target:
        writer = csv.DictWriter(target, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    title = f"{arguments.config}: fine-tuning for {arguments.epochs} epochs"
    plot_learning_rates(arguments.output / "study.csv", arguments.output / "study.png", title)
    print("| model | learning rate | clean accuracy % | ASR % |\n|---|---|---|---|")
    for name in MODELS.values():
        for rate in arguments.rates:
            chosen = [r for r in rows if r["model"] == name and float(r["learning_rate"]) == rate]
            cells = []
            for column in ("clean_accuracy", "attack_success_rate"):
                values = [100 * float(row[column]) for row in chosen]
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.1f} ± {deviation:.1f}")
            print(f"| {name} | {rate:g} | {' | '.join(cells)} |")
    print(f"{len(arguments.seeds)} seeds, mean ± standard deviation; {arguments.output / 'study.csv'}")


if __name__ == "__main__":
    main()
