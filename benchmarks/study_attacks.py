"""Every shipped attack under one protocol: clean accuracy, ASR, RA, how visible, and what it costs.

Puts each `configs/attack/NAME.yaml` behind a base config, trains it per seed, and measures the trigger of the trained
model with `lightning-bd preview`. Prints a Markdown table; writes study.csv and one preview per attack. Resumable: what
has finished is skipped. `--report` only reads what is there. Beside it, `--board FILE` prints a published table's
numbers for the attacks that have the same name there; compare them only where the protocol is the same.

    python benchmarks/study_attacks.py --config badnets_digits --seeds 1 2 3
    python benchmarks/study_attacks.py --config badnets_cifar10_small --seeds 1 --overrides --data.root FOLDER
"""

import argparse
import csv
import time
from pathlib import Path

import yaml
from _tables import mean_and_deviation, print_markdown

from lightning_bd.cli import main as lightning_bd
from lightning_bd.config_files import find_config, merged_config, shipped_configs
from lightning_bd.reports.figures import read_rows

COLUMNS = (
    "attack", "seed", "clean_accuracy", "attack_success_rate", "robust_accuracy", "psnr", "ssim", "largest_change",
    "seconds", "total_seconds",
)  # fmt: skip
#: Needs images that somebody made elsewhere.
LEFT_OUT = {"precomputed"}
#: Our names -> those of the BackdoorBench board.
BOARD = {
    "badnets": "badnet", "blended": "blended", "sig": "sig", "low_frequency": "lf", "ssba": "ssba", "wanet": "wanet",
    "input_aware": "inputaware", "bpp": "bpp", "label_consistent": "lc", "lira": "lira",
}  # fmt: skip


def train(attack: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train and measure one model; one that is finished is skipped."""
    folder = arguments.output / attack / f"seed{seed}"
    given = ["--config", arguments.config, *([] if attack == "none" else ["--config", f"attack/{attack}"])]
    given += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder / "run")]
    given += ["--trainer.enable_progress_bar", "false", *extra(attack, arguments), *arguments.overrides]
    asked = given.copy()
    if (folder / "study.yaml").is_file():
        before = yaml.safe_load((folder / "study.yaml").read_text())["given"]
        if before != asked:
            raise SystemExit(f"{folder} was made otherwise: {' '.join(before)}. Give another --output.")
        return
    start = time.monotonic()
    if attack == "none":
        config = merged_config([arguments.config])
        for phase in config["trainer"]["phases"].values():
            phase["poisoned"] = False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "clean.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        given[1] = str(folder / "clean.yaml")
    lightning_bd(["fit", *given])
    seconds = time.monotonic() - start
    if attack != "none":
        (checkpoint,) = (folder / "run").glob("[0-9][0-9]_*/final.ckpt")
        lightning_bd(["preview", *given, "--ckpt_path", str(checkpoint), "--output", str(folder / "preview.png")])
    (folder / "study.yaml").write_text(yaml.safe_dump({"total_seconds": round(seconds, 1), "given": asked}))


def extra(attack: str, arguments: argparse.Namespace) -> list[str]:
    """Return what an attack cannot do without."""
    if attack == "narcissus" and arguments.ood is not None:
        return [f"--data.poison.trigger.ood={arguments.ood}", "--data.poison.trigger.max_images=100"]
    if attack == "adaptive_blend":
        # Its 0.003 is 150 of CIFAR-10's images, and next to none of a small set's.
        return [f"--data.poison.rate={arguments.adaptive_rate}", f"--data.poison.cover_rate={arguments.adaptive_rate}"]
    return []


def collect(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Return a row per model that has finished."""
    found = []
    for attack in arguments.attacks:
        for seed in arguments.seeds:
            folder = arguments.output / attack / f"seed{seed}"
            if not (folder / "study.yaml").is_file():
                continue
            result = read_rows(folder / "run" / "results.csv")[-1]
            stealth = read_rows(folder / "preview.csv")[-1] if attack != "none" else {}
            total = yaml.safe_load((folder / "study.yaml").read_text())["total_seconds"]
            known = {name: (result | stealth).get(name, "") for name in COLUMNS}
            if attack == "none":  # measured with the base config's trigger, which the model has never seen
                known |= {"attack_success_rate": "", "robust_accuracy": ""}
            found.append(known | {"attack": attack, "seed": str(seed), "total_seconds": str(total)})
    return found


def report(arguments: argparse.Namespace) -> None:
    """Write study.csv and print the table."""
    rows = collect(arguments)
    if not rows:
        raise SystemExit(f"nothing has finished in {arguments.output}")
    with (arguments.output / "study.csv").open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{arguments.config}: mean ± standard deviation over seeds {', '.join(map(str, arguments.seeds))}\n")
    table = []
    for attack in arguments.attacks:
        mine = [row for row in rows if row["attack"] == attack]
        if not mine:
            continue
        cells = [
            mean_and_deviation([100 * float(row[name]) for row in mine if row[name]])
            for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy")
        ]
        for name, digits in (("psnr", 1), ("ssim", 3), ("largest_change", 3), ("total_seconds", 0)):
            values = [float(row[name]) for row in mine if row[name]]
            cells.append(f"{sum(values) / len(values):.{digits}f}" if values else "-")
        table.append([attack + (f" (n={len(mine)})" if len(mine) < len(arguments.seeds) else ""), *cells])
    print_markdown(["attack", "clean accuracy %", "ASR %", "RA %", "PSNR dB", "SSIM", "L-infinity", "seconds"], table)
    if arguments.board is not None:
        board(arguments)


def board(arguments: argparse.Namespace) -> None:
    """Print the published numbers of PreAct-ResNet-18 without a defense, 10 % poisoned."""
    rows = [
        row
        for row in read_rows(arguments.board)
        if row["backbone"] == "preactresnet18" and row["defense_name"] == "no defense"
    ]
    found = {row["attack_name"]: row for row in rows if float(row["ratio"]) == 0.1}
    print("\nBackdoorBench, PreAct-ResNet-18, 10 %, no defense\n")
    table = [
        [attack, *(found[BOARD[attack]][name] for name in ("ca", "asr", "ra"))]
        for attack in arguments.attacks
        if BOARD.get(attack) in found
    ]
    print_markdown(["attack", "clean accuracy %", "ASR %", "RA %"], table)


def main() -> None:
    """Run, write, print."""
    shipped = ["none", *(name.removeprefix("attack/") for name in shipped_configs("attack"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="badnets_digits", help="the base")
    parser.add_argument("--attacks", nargs="+", choices=shipped, default=[a for a in shipped if a not in LEFT_OUT])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ood", type=Path, help="folder of labelled other images, for narcissus")
    parser.add_argument("--adaptive_rate", type=float, default=0.05, help="both rates of adaptive_blend")
    parser.add_argument("--board", type=Path, help="CSV of BackdoorBench's board")
    parser.add_argument("--output", type=Path, help="default: runs/study_attacks/CONFIG")
    parser.add_argument("--report", action="store_true", help="run nothing, report what has finished")
    parser.add_argument(
        "--overrides", nargs=argparse.REMAINDER, default=[], help="last: further arguments, such as --data.root=FOLDER"
    )
    arguments = parser.parse_args()
    arguments.output = arguments.output or Path("runs/study_attacks") / find_config(arguments.config).stem
    if not arguments.report:
        for seed in arguments.seeds:
            for attack in arguments.attacks:
                train(attack, seed, arguments)
    report(arguments)


if __name__ == "__main__":
    main()
