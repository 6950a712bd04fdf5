r"""How well detectors tell out-of-distribution and poisoned images apart, over several seeds.

Scores models that `benchmarks/study_sbl.py` has trained, with `lightning-bd score`: the clean one against the sets of
`--near` and `--far`, the attacked ones against their triggered test images and poisoned training images. Prints the
tables as Markdown. Resumable: the same command continues; `--report` only reads what is there.

    python benchmarks/study_sbl.py --data FOLDER --triggers badnets --attacks_only --seeds 1 2 3 \
        --rows clean CBL "CBL, dynamic poison" "SBL-EWC with SAM"
    python benchmarks/study_sbl.py --data FOLDER --triggers blended sig wanet --rows CBL --attacks_only --seeds 1 2 3
    python benchmarks/study_detection.py --data FOLDER --near tiny-imagenet=FOLDER \
        --far mnist=FOLDER textures=FOLDER gtsrb=FOLDER --seeds 1 2 3
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from _tables import mean_and_deviation, print_markdown

from lightning_bd.cli import main as lightning_bd
from lightning_bd.reports.figures import read_rows

# Column of the table -> trigger and phase.
ATTACKS = {
    "BadNets": ("badnets", "cbl"),
    "Blended": ("blended", "cbl"),
    "SIG": ("sig", "cbl"),
    "WaNet": ("wanet", "cbl"),
    "BadNets, dynamic": ("badnets", "cbl-dynamic"),
    "BadNets, SBL": ("badnets", "ewc-sam"),
    "Blended, SBL": ("blended", "ewc-sam"),
    "SIG, SBL": ("sig", "ewc-sam"),
}
OOD = ("ctm", "msp", "max_logit", "energy", "gen", "odin", "mahalanobis", "rmd", "knn", "vim", "react", "ash")
ON_IMAGES = ("cd", "strip", "scale_up", "badexpert")
ON_DATA_SETS = ("ac", "spectral", "scan")
VARIANTS = {
    "ctm_classifier": {"reference": "classifier"},
    "ctm_centered": {"center": True},
}


def write_variants(folder: Path) -> dict[str, str]:
    """Write one file per variant of CTM; return their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in VARIANTS.items():
        content = {"class_path": "lightning_bd.callbacks.ClassTypicalMatching", "init_args": options}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {name: str(folder / f"{name}.yaml") for name in VARIANTS}


def score(
    arguments: argparse.Namespace, seed: int, trigger: str, phase: str, detectors: Sequence[str], more: Sequence[str]
) -> list[dict[str, str]]:
    """Score one model, unless only a report is wanted; return the rows of its detection.csv."""
    found = sorted(arguments.runs.glob(f"{trigger}/seed{seed}/[0-9][0-9]_{phase}/final.ckpt"))
    if not found:
        return []
    checkpoint = found[0]
    output = arguments.output / checkpoint.parent.parent.parent.name / f"seed{seed}"
    if not arguments.report:
        lightning_bd([
            "score", "--ckpt_path", str(checkpoint), "--data.root", str(arguments.data), "--detectors", *detectors,
            "--trainer.default_root_dir", str(output), "--max_images", str(arguments.max_images),
            # The models were trained in bfloat16; scores are compared, and deserve all digits.
            "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false", *more,
        ])  # fmt: skip
    file = output / "score" / checkpoint.parent.name / "detection.csv"
    return read_rows(file) if file.is_file() else []


def cell(rows: Sequence[dict[str, str]], column: str) -> str:
    """Return mean and deviation in percent."""
    return mean_and_deviation([100 * float(row[column]) for row in rows])


def print_ood(rows: Sequence[dict[str, str]], near: Sequence[str], far: Sequence[str]) -> None:
    """Print AUROC and FPR of each set, and the mean of the far ones."""
    names = list(dict.fromkeys(row["detector"] for row in rows))
    table = []
    for name in names:
        cells = []
        for each in (*near, *far):
            chosen = [row for row in rows if row["detector"] == name and row["set"] == each]
            cells.append(f"{cell(chosen, 'auroc')} / {cell(chosen, 'fpr95_in')}")
        table.append([name, *cells])
    heads = [f"near: {each}" for each in near] + [f"far: {each}" for each in far]
    print("\nOut of distribution: AUROC % / FPR % at 95 % TPR, in-distribution positive\n")
    print_markdown(["detector", *heads], table)


def print_attacks(rows: dict[str, list[dict[str, str]]], column: str, title: str) -> None:
    """Print one row per detector and one column per attack."""
    attacks = [attack for attack in ATTACKS if rows[attack]]
    names = list(dict.fromkeys(row["detector"] for attack in attacks for row in rows[attack]))
    table = []
    for name in names:
        cells = []
        for attack in attacks:
            wanted = "train" if name in ON_DATA_SETS else "poisoned"
            cells.append(cell([r for r in rows[attack] if r["detector"] == name and r["set"] == wanted], column))
        table.append([name, *cells])
    print(f"\n{title}\n")
    print_markdown(["detector", *attacks], table)


def main() -> None:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10: train/<class>/*, test/<class>/*")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_sbl"), help="what study_sbl.py wrote")
    parser.add_argument("--near", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--far", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--max_images", type=int, default=500, help="per set, for detectors that change the images")
    parser.add_argument("--output", type=Path, default=Path("runs/study_detection"))
    parser.add_argument("--report", action="store_true", help="score nothing, report what is there")
    arguments = parser.parse_args()
    variants = write_variants(arguments.output / "variants")
    sets = dict(pair.split("=", 1) for pair in (*arguments.near, *arguments.far))
    outside = [f"--ood.{name}={folder}" for name, folder in sets.items()]
    # On the images that the model was trained on, as is the custom for these; the auditor's few are for backdoors.
    outside += ["--split", "inject", "--train", "false"]
    ood: list[dict[str, str]] = []
    attacked: dict[str, list[dict[str, str]]] = {attack: [] for attack in ATTACKS}
    for seed in arguments.seeds:
        if sets:
            ood += score(arguments, seed, "*", "clean", (*OOD, *variants.values()), outside)
        for attack in arguments.attacks:
            trigger, phase = ATTACKS[attack]
            detectors = (*OOD, *ON_IMAGES, *ON_DATA_SETS)
            attacked[attack] += score(arguments, seed, trigger, phase, detectors, ())
    if ood:
        names = [pair.split("=", 1)[0] for pair in arguments.near], [pair.split("=", 1)[0] for pair in arguments.far]
        print_ood(ood, *names)
    print_attacks(attacked, "auroc", "Poisoned images: AUROC %")
    print_attacks(attacked, "tpr_at_fpr1", "Poisoned images: TPR % at 1 % FPR")


if __name__ == "__main__":
    main()
