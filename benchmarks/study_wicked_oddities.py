"""Do hard images make better clean-label poisons than random ones, at equal rate?

Trains a config's victim once per trigger, rate of the target class, selection and seed, all on the same images. Prints
clean accuracy and ASR (target class excluded) as Markdown, with the difference to the random choice of the same seed.
Resumable: what has finished is skipped. `--report` only reads what is there.

    python benchmarks/study_wicked_oddities.py --data CIFAR10 --ood GTSRB/train --seeds 1 2 3
"""

import argparse
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from _tables import mean_and_deviation, print_markdown

from lightning_bd.cli import main as lightning_bd
from lightning_bd.config_files import find_config, read_config
from lightning_bd.reports.figures import read_rows

TRIGGERS: dict[str, dict[str, object]] = {
    "badnets": {"class_path": "lightning_bd.triggers.BadNets", "init_args": {"size": 4, "pattern": "white"}},
    "blended": {"class_path": "lightning_bd.triggers.Blended", "init_args": {"ratio": 0.2}},
    "sig": {"class_path": "lightning_bd.triggers.SIG"},
}
SELECTIONS = ("random", "knn", "mean", "ood", "loss")


class Run(NamedTuple):
    """One victim."""

    trigger: str
    rate: float
    selection: str
    seed: int


def scorer(run: Run, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the part of the config that says how difficulty is measured."""
    surrogate = {
        "class_path": "lightning_bd.selection.Surrogate",
        "init_args": {
            "backbone": "lightning_bd.backbones.resnet18", "backbone_arguments": {"width": arguments.width},
            "epochs": arguments.surrogate_epochs, "lr": 0.05, "seed": run.seed,
        },
    }  # fmt: skip
    if run.selection == "random":
        return _part("RandomSelection", {"seed": run.seed})
    if run.selection == "loss":
        return _part("LossScore", {"surrogate": surrogate})
    if run.selection == "ood":
        return _part("OODLoss", {"ood": str(arguments.ood), "max_images": 100, "surrogate": surrogate})
    encoder = _part(
        "SelfSupervisedEncoder",
        {
            "backbone": "lightning_bd.backbones.resnet18", "backbone_arguments": {"width": arguments.width},
            "epochs": arguments.encoder_epochs, "seed": run.seed, "precision": "bfloat16",
        },
    )  # fmt: skip
    name = {"knn": "KNNTypicality", "mean": "MeanTypicality"}[run.selection]
    return _part(name, {"encoder": encoder})


def _part(name: str, options: dict[str, object]) -> dict[str, object]:
    return {"class_path": f"lightning_bd.selection.{name}", "init_args": options}


def train(run: Run, arguments: argparse.Namespace) -> None:
    """Train one victim; one that is finished is skipped."""
    folder = folder_of(run, arguments)
    config = read_config(find_config(arguments.config))
    config["data"]["init_args"]["poison"] |= {
        "trigger": TRIGGERS[run.trigger], "rate": run.rate, "selection": scorer(run, arguments), "seed": run.seed,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    given = ["fit", "--config", str(file), "--seed_everything", str(run.seed), "--trainer.default_root_dir",
             str(folder / "run"), "--trainer.enable_progress_bar", "false", *arguments.overrides]  # fmt: skip
    lightning_bd([*given, "--data.root", str(arguments.data)] if arguments.data is not None else given)


def folder_of(run: Run, arguments: argparse.Namespace) -> Path:
    """Return where a run lies."""
    return Path(arguments.output) / run.trigger / f"{run.rate:g}" / run.selection / f"seed{run.seed}"


def finished(arguments: argparse.Namespace) -> Iterator[tuple[Run, float, float]]:
    """Yield clean accuracy and ASR, both in percent, of what has finished."""
    for run in runs(arguments):
        file = folder_of(run, arguments) / "run" / "results.csv"
        if file.exists() and (rows := read_rows(file)):
            yield run, 100 * float(rows[-1]["clean_accuracy"]), 100 * float(rows[-1]["attack_success_rate"])


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield all that are asked for, seed by seed."""
    for seed, rate, trigger, selection in itertools.product(
        arguments.seeds, arguments.rates, arguments.triggers, arguments.selections
    ):
        yield Run(trigger, rate, selection, seed)


def report(arguments: argparse.Namespace) -> None:
    """Write study.csv and print the tables."""
    found = {run: (accuracy, asr) for run, accuracy, asr in finished(arguments)}
    if not found:
        raise SystemExit(f"nothing has finished in {arguments.output}")
    with (arguments.output / "study.csv").open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow([*Run._fields, "clean_accuracy", "attack_success_rate"])
        writer.writerows([*run, *(f"{value:.2f}" for value in values)] for run, values in found.items())
    print(f"\nMean ± standard deviation over seeds {', '.join(map(str, arguments.seeds))}; n where some are missing\n")
    for title, column in (("ASR %", 1), ("Clean accuracy %", 0)):
        table = []
        for trigger, rate in itertools.product(arguments.triggers, arguments.rates):
            cells = []
            for selection in arguments.selections:
                values = [
                    found[run][column]
                    for seed in arguments.seeds
                    if (run := Run(trigger, rate, selection, seed)) in found
                ]
                missing = f" (n={len(values)})" if 0 < len(values) < len(arguments.seeds) else ""
                cells.append(mean_and_deviation(values) + missing)
            table.append([trigger, f"{rate:.0%}", *cells])
        print_markdown([title, "rate", *arguments.selections], table)
        print()
    print("ASR minus that of the random choice with the same trigger, rate and seed, in points\n")
    table = []
    for selection in arguments.selections:
        pairs = [
            values[1] - found[run._replace(selection="random")][1]
            for run, values in found.items()
            if run.selection == selection != "random" and run._replace(selection="random") in found
        ]
        if pairs:
            wins = sum(pair > 0 for pair in pairs)
            table.append([selection, mean_and_deviation(pairs), f"{wins} of {len(pairs)}"])
    print_markdown(["selection", "difference", "better than random"], table)


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wicked_oddities_cifar10_small")
    parser.add_argument("--data", type=Path, help="folder of the images, for configs that need one")
    parser.add_argument("--ood", type=Path, help="folder of labelled other images, for the selection `ood`")
    parser.add_argument("--triggers", nargs="+", default=list(TRIGGERS), choices=TRIGGERS)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="of the target class")
    parser.add_argument("--selections", nargs="+", default=list(SELECTIONS), choices=SELECTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--width", type=int, default=8, help="of the attacker's ResNet-18")
    parser.add_argument("--surrogate_epochs", type=int, default=10)
    parser.add_argument("--encoder_epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/study_wicked_oddities"))
    parser.add_argument(
        "--overrides",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: further arguments, such as --trainer.max_epochs=1",
    )
    parser.add_argument("--report", action="store_true", help="run nothing, report what has finished")
    arguments = parser.parse_args()
    if "ood" in arguments.selections and arguments.ood is None and not arguments.report:
        parser.error("--ood FOLDER is needed for the selection `ood`")
    if not arguments.report:
        for run in runs(arguments):
            train(run, arguments)
    report(arguments)


if __name__ == "__main__":
    main()
