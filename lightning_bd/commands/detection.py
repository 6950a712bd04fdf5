"""The commands that look for suspicious images, as methods of a Trainer."""

import hashlib
import re
import sys
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.table import Table

from lightning_bd.callbacks.detection.score_table import write_scores
from lightning_bd.commands.checkpoints import named_after, own_data, take_over
from lightning_bd.commands.detectors import load_detectors
from lightning_bd.commands.score import (
    CLEAN,
    POISONED,
    TRAIN,
    DetectorFailedError,
    Scores,
    Scoring,
    judge,
    write_detection,
)
from lightning_bd.commands.suspicious import draw_explanations, draw_suspicious
from lightning_bd.datamodules import ImageDataModule, PhaseData, ood_loader, write_excluded
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.description import describe
from lightning_bd.functional.digest import weights_sha256
from lightning_bd.phase import INIT
from lightning_bd.phase_measurement import copy_state
from lightning_bd.phase_setup import data_of
from lightning_bd.phases import MultiPhaseTrainer
from lightning_bd.quiet import threads
from lightning_bd.reports import detection_figures
from lightning_bd.results_table import wide_console
from lightning_bd.run_folder import RunFolder

__all__ = ("DetectionTrainer",)


class DetectionTrainer(MultiPhaseTrainer):
    """Scores images with detectors, and leaves suspicious ones out of the training set."""

    def score(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | Path,
        detectors: str | list[str] = "all",
        split: str = "defend",
        ood: dict[str, str] | None = None,
        max_images: int = 500,
        train: bool | None = None,
    ) -> None:
        """Score images with detectors and measure how well each tells suspicious ones apart.

        Detectors are fitted on the clean images of `split`. They score the clean test images, the triggered ones where
        the checkpoint's manifest or the config tells the trigger, and every folder of `--ood.NAME PATH`. Those that
        look at a whole data set score the training images, as they lie in the poisoned data set. Scores, metrics and
        figures go to `score/<checkpoint>` in `trainer.default_root_dir`; what has been scored is not scored again.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: The model to look at, such as a run's `NN_<phase>/final.ckpt`.
            detectors: Names of shipped detectors or YAML files with class_path and init_args, joined by commas or
                spaces; `all` for every shipped one.
            split: The split of the training set whose clean images detectors are fitted on.
            ood: Folders of out-of-distribution images, by name: `--ood.textures PATH`.
            max_images: At most so many images per set for the detectors that run the model on changed images; the
                others score all.
            train: Whether to score the training images with all detectors too; if not given, only with those of whole
                data sets.
        """
        self._refuse_several("score")
        chosen, data = load_detectors(detectors), own_data(datamodule, self.phases)
        scoring, root = self._scoring(model, data, Path(ckpt_path), split, max_images)
        sets: dict[str, BatchLoader] = {}
        for name, loader in zip((CLEAN, POISONED), data.test_dataloader(), strict=False):
            sets[name] = loader
        for name, folder in (ood or {}).items():
            if not re.fullmatch(r"[\w.-]+", name) or name in (CLEAN, POISONED, TRAIN):
                raise MisconfigurationException(
                    f"`{name}` cannot be the name of a set of images: use letters, digits, `_`, `-`, `.`, and none of"
                    f" {CLEAN}, {POISONED}, {TRAIN}."
                )
            sets[name] = ood_loader(data, Path(folder), name)
        asked = {name: d for name, d in chosen.items() if train or (train is None and not d.compares_sets)}
        # Where nothing else would be scored, training images are asked for too.
        needed = bool(train) or all(not d.compares_sets for d in chosen.values())
        whole = self._known_training_images(data, Path(ckpt_path), needed) if asked else None
        if whole is not None and train:
            _warn_of_overlap(data, split, whole)
        with threads(self.num_threads):
            scores = scoring.run(chosen, sets)
            if whole is not None:
                for name, of_sets in scoring.run(asked, {TRAIN: whole}).items():
                    scores.setdefault(name, {}).update(of_sets)
                sets[TRAIN] = whole
            if scores:
                self._write(scores, root)
                draw_suspicious(scoring, scores, sets, root)
                draw_explanations(scoring, scores, chosen, sets, root)
        _raise_failures(scoring)

    def filter(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | Path,
        detector: str = "cd",
        keep: float = 0.95,
        split: str = "defend",
        output: str | Path | None = None,
    ) -> None:
        """Write which training images to leave out: the most suspicious ones to one detector.

        `lightning-bd filter --ckpt_path CKPT --detector cd --keep 0.95`, then train again with `--data.exclude FILE`.
        Scored are the training images of the checkpoint's poisoned phase, as they lie in the poisoned data set; its
        poison has to be static.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: A model that was trained on the data set that is to be cleaned.
            detector: Name of a shipped detector, or a YAML file with class_path and init_args.
            keep: Share of the images that stay, in (0, 1).
            split: The split whose clean images the detector is fitted on.
            output: The file to write; `score/<checkpoint>/exclude_<detector>.json` in `trainer.default_root_dir` if
                not given.
        """
        self._refuse_several("filter")
        if not 0 < keep < 1:
            raise ValueError(f"Expected argument `keep` to be a share in (0, 1), but got {keep}.")
        chosen, data = load_detectors(detector), own_data(datamodule, self.phases)
        if len(chosen) != 1:
            raise MisconfigurationException(f"`filter` takes one detector, but got {', '.join(chosen)}.")
        ((name, found),) = chosen.items()
        scoring, root = self._scoring(model, data, Path(ckpt_path), split, sys.maxsize)
        whole = self._training_images(data, Path(ckpt_path), fixed=True)
        assert whole is not None
        _warn_of_overlap(data, split, whole)
        with threads(self.num_threads):
            scores = scoring.run({name: found}, {TRAIN: whole})
        _raise_failures(scoring)
        known = scores[name][TRAIN]
        order = known.score.argsort(descending=True, stable=True)
        dropped = order[: len(order) - max(1, round(keep * len(order)))]
        path = Path(output) if output is not None else root / f"exclude_{name}.json"
        # Those of before stay out: they are in no split of this data.
        excluded = [*data.excluded.tolist(), *known.index[dropped].tolist()]
        write_excluded(path, data.fingerprint(), excluded, name, keep)
        before = f", beside the {len(data.excluded)} that were before" if len(data.excluded) else ""
        found_text = ""
        if known.poisoned is not None and bool(known.poisoned.any()):
            hit, total = int(known.poisoned[dropped].sum()), int(known.poisoned.sum())
            # For whoever knows the attack; the detector did not.
            found_text = f" Among them are {hit} of the {total} poisoned ones."
        wide_console().print(
            f"{len(dropped)} of {len(order)} training images are left out by {path}{before}.{found_text}\n"
            f"Train again with `--data.exclude {path}` and another `--trainer.default_root_dir`.",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip

    def _scoring(
        self, model: LightningModule, data: ImageDataModule, path: Path, split: str, max_images: int
    ) -> tuple[Scoring, Path]:
        if max_images < 1:
            raise ValueError(f"Expected argument `max_images` to be a positive integer, but got {max_images}.")
        take_over(path, model, data, override_trigger=self.override_trigger)
        data.set_phase(PhaseData("score", splits=(split,)))
        root = Path(self.default_root_dir) / "score" / named_after(path)
        if self.fresh:
            RunFolder(root, [], marker="score.json").rename_old()
        data.learn_trigger()
        poison, precision = data.poison, self.precision_plugin.precision
        facts = {
            "model": describe(model),
            "precision": str(precision),
            "weights_sha256": weights_sha256(copy_state(model)),
            "data_sha256": data.fingerprint(),
            "fitted_on": split,
            "fit_images_sha256": hashlib.sha256(data.positions((split,)).numpy().tobytes()).hexdigest(),
            "poison": describe(poison),
            "trigger_sha256": None if poison is None else weights_sha256(poison.trigger.state_dict()),
        }
        return Scoring(self, model, data, root, facts, max_images), root

    def _known_training_images(self, data: ImageDataModule, path: Path, needed: bool) -> BatchLoader | None:
        """Return the training images; where they cannot be made and are not needed, warn and go on without them."""
        try:
            return self._training_images(data, path)
        except (OSError, ValueError) as error:
            if needed:
                raise
            rank_zero_warn(f"The training images are not scored: {error}\nThe other sets are.")
            return None

    def _training_images(self, data: ImageDataModule, path: Path, *, fixed: bool = False) -> BatchLoader | None:
        """Return the images that the checkpoint's backdoor was trained on; ``None`` where it is not known."""
        name, phases = re.sub(r"^\d+_", "", named_after(path)), self.phases
        while name in phases and not phases[name].poisoned:
            parent = self._parents[name]
            if parent == INIT:
                break
            name = parent
        if data.poison is None or name not in phases or not phases[name].poisoned:
            if fixed:
                raise MisconfigurationException(
                    f"It is not known which poisoned images {path} was trained on: it lies in no folder of a phase, or"
                    " no phase before it is `poisoned`."
                )
            return None
        phase = data_of(phases[name], data)
        if phase.poison == "dynamic":
            if fixed:
                raise MisconfigurationException(
                    f"Phase `{name}` poisons each batch anew, so there are no poisoned images to leave out. Filter a"
                    " model of a phase with `poisoned: static`."
                )
            rank_zero_info(
                f"Phase `{name}` poisons each batch anew: its training images are poisoned once for scoring."
            )
        elif data.record is not None and data.record.chosen(phase.name) is None:
            raise ValueError(
                f"The manifest of {path} does not say which images phase `{name}` poisoned: they were not fixed. Set"
                " its `poisoned`, or the poison's `mode`, to `dynamic`, as the model was trained."
            )
        return data.stored_dataloader(PhaseData(phase.name, phase.splits, "static"))

    def _write(self, scores: Scores, root: Path) -> None:
        table = root / "scores.parquet"
        write_scores(table, scores, CLEAN)
        rows = judge(scores)
        write_detection(root / "detection.csv", rows)
        detection_figures(table, root)
        judged = list(dict.fromkeys(row["set"] for row in rows))
        shown = Table("detector", *judged)
        for name in scores:
            cells = {row["set"]: row for row in rows if row["detector"] == name}
            shown.add_row(name, *(_cell(cells.get(each)) for each in judged))
        console = wide_console()
        if rows:
            console.print("AUROC % / FPR % at 95 % TPR, suspicious images positive", highlight=False)
            console.print(shown)
        console.print(f"Scores, metrics and figures: {root}", soft_wrap=True, markup=False)

    def _refuse_several(self, command: str) -> None:
        if self.num_devices * self.num_nodes > 1:
            raise MisconfigurationException(f"`{command}` runs in one process: give `--trainer.devices 1`.")


def _cell(row: dict[str, str] | None) -> str:
    return "" if row is None else f"{100 * float(row['auroc']):.1f} / {100 * float(row['fpr95_out']):.1f}"


def _warn_of_overlap(data: ImageDataModule, split: str, training: BatchLoader) -> None:
    if bool(torch.isin(data.positions((split,)), training.positions).any()):
        rank_zero_warn(
            f"The images of split `{split}`, which detectors are fitted on, are among the training images that are"
            " scored, there perhaps poisoned. A defender has other clean images: give another `--split`."
        )


def _raise_failures(scoring: Scoring) -> None:
    if scoring.failures:
        raise DetectorFailedError(
            "These detectors failed and have no scores; the same command tries them again:\n  "
            + "\n  ".join(f"`{name}`: {why}" for name, why in scoring.failures.items())
        )
