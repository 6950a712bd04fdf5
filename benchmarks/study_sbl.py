"""Does sequential, flatness-aware training make backdoors that survive fine-tuning? Rows: attacks; columns: defenses.

Trains the attacks of a config (one run per trigger and seed) and defends each final model with `lightning-bd defend`:
fine-tuning at every learning rate and length, FT-SAM and NAD. Writes study.csv, figures and the tables as Markdown.
Resumable: the same command continues; what is finished is skipped. `--report` only reads what is there.

    python benchmarks/study_sbl.py --data FOLDER --triggers badnets blended sig --seeds 1 2 3
"""

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from _tables import mean_and_deviation, print_markdown

from lightning_bd.cli import main as lightning_bd
from lightning_bd.config_files import find_config, read_config
from lightning_bd.reports.figures import plot_learning_rates, read_rows

# Row of the table -> phase of the config.
ROWS = {
    "CBL": "cbl",
    "SBL-naive": "naive",
    "SBL-EWC": "ewc",
    "SBL-EWC with SAM": "ewc-sam",
    "SBL-Anchoring": "anchoring",
    "SBL-A-GEM": "a-gem",
    # Controls: the conventional order with the sequential rows' poison, and SAM without a continual-learning term.
    "CBL, dynamic poison": "cbl-dynamic",
    "SBL-naive with SAM": "naive-sam",
    "clean": "clean",
}
# Trigger -> what the poison has in place of the config's.
TRIGGERS: dict[str, dict[str, object]] = {
    "badnets": {},
    "blended": {"trigger": {"class_path": "lightning_bd.triggers.Blended"}},
    "sig": {"trigger": {"class_path": "lightning_bd.triggers.SIG"}},
    # At its paper's strength of 0.5 with noise samples 15 epochs do not learn it (ASR 8 %).
    "wanet": {"trigger": {"class_path": "lightning_bd.triggers.WaNet", "init_args": {"strength": 2.0}}},
}
COLUMNS = (
    "trigger", "model", "seed", "defense", "learning_rate", "epochs", "clean_accuracy", "attack_success_rate",
    "distance",
)  # fmt: skip


def defense_files(folder: Path, rates: Sequence[float], lengths: Sequence[int]) -> dict[str, tuple[float, int]]:
    """Write one file per defense; return learning rate and epochs by the defense's name."""
    folder.mkdir(parents=True, exist_ok=True)
    tuning = "lightning_bd.callbacks.FineTuning"
    made: dict[str, tuple[str, dict[str, object], float, int]] = {}
    for length in lengths:
        for rate in rates:
            options: dict[str, object] = {"learning_rates": [rate], "max_epochs": length}
            made[f"ft_lr{rate:g}_e{length}"] = (tuning, options, rate, length)
    longest = max(lengths)
    sam = {"learning_rates": [0.005], "max_epochs": longest, "weight_decay": 0.0, "rho": 0.05, "schedule": "constant"}
    made["ft_sam"] = (tuning, dict(sam), 0.005, longest)
    nad = {"learning_rates": [0.01], "max_epochs": longest, "teacher_epochs": longest}
    made["nad"] = ("lightning_bd.callbacks.NeuralAttentionDistillation", dict(nad), 0.01, longest)
    for name, (path, arguments, _, _) in made.items():
        phase = {"max_epochs": 0, "callbacks": [{"class_path": path, "init_args": arguments}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(phase, sort_keys=False))
    return {name: (rate, length) for name, (_, _, rate, length) in made.items()}


def attack_config(name: str, trigger: str, rows: Iterable[str], file: Path) -> None:
    """Write the config with only the phases that the rows need."""
    config = read_config(find_config(name))
    phases = config["trainer"]["phases"]
    needed: set[str] = set()
    for row in rows:
        phase = ROWS[row]
        while phase != "init":
            needed.add(phase)
            phase = phases[phase]["start_from"]
    config["trainer"]["phases"] = {key: phase for key, phase in phases.items() if key in needed}
    config["data"]["init_args"]["poison"].update(TRIGGERS[trigger])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False))


def run_seed(arguments: argparse.Namespace, trigger: str, seed: int, defenses: Iterable[str]) -> None:
    """Train the attacks of one trigger and seed and defend each."""
    folder = arguments.output / trigger / f"seed{seed}"
    config = arguments.output / trigger / "config.yaml"
    attack_config(arguments.config, trigger, arguments.rows, config)
    given = [
        "--config", str(config), "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder),
        "--trainer.enable_progress_bar", "false", *arguments.overrides,
    ]  # fmt: skip
    if arguments.data is not None:
        given += ["--data.root", str(arguments.data)]
    lightning_bd(["fit", *given])
    if arguments.attacks_only:
        return
    files = [str(arguments.output / "defenses" / f"{name}.yaml") for name in defenses]
    for row in arguments.rows:
        (checkpoint,) = folder.glob(f"[0-9][0-9]_{ROWS[row]}/final.ckpt")
        lightning_bd(["defend", *given, "--ckpt_path", str(checkpoint), "--defenses", *files])


def collect(arguments: argparse.Namespace, defenses: dict[str, tuple[float, int]]) -> list[dict[str, str]]:
    """Read what has finished so far."""
    found = []
    for trigger in arguments.triggers:
        for seed in arguments.seeds:
            for row in arguments.rows:
                folder = arguments.output / trigger / f"seed{seed}" / "defend"
                for file in folder.glob(f"[0-9][0-9]_{ROWS[row]}/results.csv"):
                    for result in read_rows(file):
                        if result["phase"] not in ("none", *defenses):
                            continue  # of a call with other rates or lengths
                        rate, epochs = defenses.get(result["phase"], (0.0, 0))
                        known = {name: result[name] for name in COLUMNS if name in result and name != "epochs"}
                        found.append(
                            {"trigger": trigger, "model": row, "seed": str(seed), "defense": result["phase"],
                             "learning_rate": f"{rate:g}", "epochs": str(epochs), **known}
                        )  # fmt: skip
    return found


def print_table(rows: Sequence[dict[str, str]], models: Sequence[str], defenses: Sequence[str], seeds: int) -> None:
    """Print clean accuracy / ASR, mean and deviation over the seeds, as Markdown; n where not all have finished."""
    table = []
    for model in models:
        cells = []
        for defense in defenses:
            chosen = [row for row in rows if row["model"] == model and row["defense"] == defense]
            parts = [
                mean_and_deviation([100 * float(row[column]) for row in chosen if row[column]])
                for column in ("clean_accuracy", "attack_success_rate")
            ]
            cells.append(" / ".join(parts) + (f" (n={len(chosen)})" if 0 < len(chosen) < seeds else ""))
        table.append([model, *cells])
    print_markdown(["attack", *defenses], table)


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="sbl_study_cifar10")
    parser.add_argument("--data", type=Path, help="folder of the images, for configs that need one")
    parser.add_argument("--triggers", nargs="+", default=["badnets"], choices=TRIGGERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 20], help="epochs of fine-tuning")
    parser.add_argument("--output", type=Path, default=Path("runs/study_sbl"))
    parser.add_argument(
        "--overrides",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: further arguments, such as --trainer.max_epochs=1",
    )
    parser.add_argument("--attacks_only", action="store_true", help="train, and defend nothing")
    parser.add_argument("--report", action="store_true", help="run nothing, report what has finished")
    arguments = parser.parse_args()
    defenses = defense_files(arguments.output / "defenses", arguments.rates, arguments.lengths)
    if not arguments.report:
        for trigger in arguments.triggers:
            for seed in arguments.seeds:
                run_seed(arguments, trigger, seed, defenses)
    if arguments.attacks_only:
        return
    rows = collect(arguments, defenses)
    if not rows:
        parser.error(f"nothing has finished in {arguments.output}")
    with (arguments.output / "study.csv").open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for trigger in arguments.triggers:
        for length in arguments.lengths:
            chosen = [row for row in rows if row["trigger"] == trigger and row["epochs"] == str(length)]
            tuned = [row for row in chosen if row["defense"].startswith("ft_lr")]
            if tuned:
                part = arguments.output / f"{trigger}_ft_{length}.csv"
                with part.open("w", newline="") as target:
                    writer = csv.DictWriter(target, COLUMNS)
                    writer.writeheader()
                    writer.writerows(tuned)
                plot_learning_rates(part, part.with_suffix(".png"), f"{trigger}: fine-tuning for {length} epochs")
        print(f"\n{trigger}: clean accuracy % / ASR %, mean ± standard deviation of {len(arguments.seeds)} seeds\n")
        models = [row for row in ROWS if row in arguments.rows]
        here = [row for row in rows if row["trigger"] == trigger]
        print_table(here, models, ["none", "ft_sam", "nad"], len(arguments.seeds))
        for length in arguments.lengths:
            print()
            names = [name for name in defenses if name.endswith(f"_e{length}")]
            print_table(here, models, names, len(arguments.seeds))


if __name__ == "__main__":
    main()
