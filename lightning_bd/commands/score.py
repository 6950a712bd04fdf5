"""``lightning-bd score``: how suspicious each image is to each detector, and how well they tell sets apart."""

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_bd.batch import RawBatch, Sample
from lightning_bd.callbacks.detection.base import DatasetDetector, Detector, InputDetector
from lightning_bd.callbacks.detection.score_table import read_scores, write_scores
from lightning_bd.callbacks.detection.session import ScoringSession, SetScores
from lightning_bd.commands.looking import progress
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.description import Description, describe, differences
from lightning_bd.files import write_text_atomically
from lightning_bd.functional.detection import detection_metrics
from lightning_bd.tables import write_rows

__all__ = (
    "CLEAN",
    "POISONED",
    "TRAIN",
    "DetectorFailedError",
    "Scores",
    "Scoring",
    "judge",
    "narrowed",
    "write_detection",
)

#: Names of the sets: the test images as they are and triggered, and the training images as they lie in the data set.
CLEAN, POISONED, TRAIN = "clean", "poisoned", "train"
_METRICS = ("auroc", "aupr_out", "aupr_in", "fpr95_out", "fpr95_in", "tpr_at_fpr1")
_COLUMNS = ("detector", "set", "negatives", "positives", *_METRICS)

Scores = dict[str, dict[str, SetScores]]


class DetectorFailedError(RuntimeError):
    """At least one detector ended with an error; the others have their scores."""


@dataclass
class Scoring:
    """Scores sets of images with detectors; what a detector has scored before is read from the folder.

    Args:
        trainer: Knows device and precision, and whether to show progress.
        model: The model, with its weights.
        datamodule: Finishes the batches, and has the clean images to fit on.
        folder: Where scores are kept.
        facts: What the scores depend on beside the sets: weights, data, split.
        max_images: At most so many images per set for each detector that runs the model on changed images.
    """

    trainer: Trainer
    model: LightningModule
    datamodule: ImageDataModule
    folder: Path
    facts: Mapping[str, Description]
    max_images: int
    failures: dict[str, str] = field(default_factory=dict)

    def run(self, detectors: Mapping[str, Detector], sets: Mapping[str, BatchLoader]) -> Scores:
        """Score what has not been scored.

        Detectors of a whole data set look at the set :data:`TRAIN` only; the others at all sets.

        Args:
            detectors: Name -> detector.
            sets: Name -> its images.

        Returns:
            Detector -> set -> scores, of the detectors that have not failed.

        Raises:
            MisconfigurationException: If the folder holds scores of another model or data set.
        """
        self._open()
        self.datamodule.batch_format = "sample"
        self.model.to(self._device)
        wanted = {
            (name, each)
            for name, detector in detectors.items()
            for each in sets
            if each == TRAIN or not isinstance(detector, DatasetDetector)
        }
        # Of files, a fingerprint asks the disk for each.
        prints = {each: loader.images.fingerprint() for each, loader in sets.items()}
        keys = {(name, each): self._key(name, detectors[name], each, sets[each], prints[each]) for name, each in wanted}
        waiting = {place for place in wanted if self._key_of(*place) != keys[place]}
        shared = {name: d for name, d in detectors.items() if not isinstance(d, InputDetector)}
        shared = {name: d for name, d in shared.items() if any(place[0] == name for place in waiting)}
        self._score_shared(shared, sets, keys)
        for name, detector in detectors.items():
            if isinstance(detector, InputDetector) and name not in self.failures:
                missing = {each: sets[each] for each in sets if (name, each) in waiting}
                if missing:
                    self._score_input(name, detector, missing, keys)
        found: Scores = {}
        for name in detectors:
            for each in sets:
                if (name, each) in wanted and self._key_of(name, each) == keys[name, each]:
                    found.setdefault(name, {})[each] = read_scores(self._part(name, each))[name][each]
        return {name: of_sets for name, of_sets in found.items() if name not in self.failures}

    def batches(self, loader: BatchLoader, title: str) -> Iterator[tuple[RawBatch, Tensor, Tensor, Tensor]]:
        """Yield raw batches with their finished images, labels and flags, under a progress bar.

        Args:
            loader: The images.
            title: For the bar.
        """
        for raw in progress(loader, len(loader), title, self.trainer):
            sample = self.datamodule.on_after_batch_transfer(raw.to(self._device), 0)
            assert isinstance(sample, Sample)
            yield raw, sample.image, sample.label, sample.is_poisoned

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device

    def _open(self) -> None:
        """Make the folder, or check that its scores are of this model and data."""
        file = self.folder / "score.json"
        if file.is_file():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise MisconfigurationException(f"Cannot read {file}: {error}. Remove {self.folder}.") from None
            found = differences(before, dict(self.facts))
            if found:
                raise MisconfigurationException(
                    f"The scores in {self.folder} are of other weights or data:\n  " + "\n  ".join(found[:10]) + "\n"
                    "Start over with `--fresh` (the old folder is renamed), or give another `trainer.default_root_dir`."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(dict(self.facts), indent=2) + "\n")

    def _score_shared(
        self, detectors: Mapping[str, Detector], sets: Mapping[str, BatchLoader], keys: Mapping[tuple[str, str], str]
    ) -> None:
        if not detectors:
            return
        plain = [d for d in detectors.values() if not isinstance(d, DatasetDetector)]
        on_train = list(detectors.values())
        names = {id(detector): name for name, detector in detectors.items()}
        for group, chosen in (
            (plain, {each: loader for each, loader in sets.items() if each != TRAIN}),
            (on_train, {each: loader for each, loader in sets.items() if each == TRAIN}),
        ):
            if not group or not chosen:
                continue
            session = self._session([d for d in group if names[id(d)] not in self.failures], names)
            self._fit(session)
            for number, (each, loader) in enumerate(chosen.items()):
                self._pass(session, number, each, loader, each)
                for detector, scores in session.result(number).items():
                    self._keep(names[id(detector)], each, scores, keys[names[id(detector)], each])

    def _score_input(
        self, name: str, detector: InputDetector, sets: Mapping[str, BatchLoader], keys: Mapping[tuple[str, str], str]
    ) -> None:
        session = self._session([detector], {id(detector): name})
        start = time.perf_counter()
        self._fit(session)
        for number, (each, loader) in enumerate(sets.items()):
            self._pass(session, number, each, self._limited(loader), f"{name}: {each}")
            for scores in session.result(number).values():
                self._keep(name, each, scores, keys[name, each])
        rank_zero_info(f"{name}: {time.perf_counter() - start:.1f} s")

    def _pass(self, session: ScoringSession, number: int, each: str, loader: BatchLoader, title: str) -> None:
        if not session.detectors:
            return
        for raw, images, labels, flags in self.batches(loader, title):
            if session.detectors:
                session.run(number, (images, labels), raw.indices, _flags(each, flags))

    def _session(self, detectors: Sequence[Detector], names: Mapping[int, str]) -> ScoringSession:
        def fail(detector: Detector, error: Exception) -> None:
            name = names[id(detector)]
            self.failures[name] = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"The detector `{name}` failed: {self.failures[name]}\nThe others go on.")

        return ScoringSession(self.model, detectors, self.trainer.precision_plugin.forward_context, fail)

    def _fit(self, session: ScoringSession) -> None:
        def batches(source: Iterable[object] | None) -> Iterator[tuple[Tensor, Tensor]]:
            assert source is None
            for _, images, labels, _ in self.batches(self.datamodule.clean_fit_dataloader(), "fit"):
                yield images, labels

        session.fit(batches, origin=self.datamodule)

    def _limited(self, loader: BatchLoader) -> BatchLoader:
        if len(loader.positions) <= self.max_images:
            return loader
        # Spread evenly over the set.
        chosen = torch.linspace(0, len(loader.positions) - 1, self.max_images).round().long()
        return narrowed(loader, loader.positions[chosen])

    def _key(self, name: str, detector: Detector, each: str, loader: BatchLoader, images: str) -> str:
        options = describe({key: value for key, value in vars(detector).items() if key[0] != "_" and key not in _STATE})
        limit = min(self.max_images, len(loader.positions)) if isinstance(detector, InputDetector) else None
        positions = hashlib.sha256(loader.positions.numpy().tobytes()).hexdigest()
        content = [name, type(detector).__qualname__, options, each, positions, images, limit]
        if loader.static_rows is not None:
            content.append(hashlib.sha256(loader.static_rows.numpy().tobytes()).hexdigest())
        return hashlib.sha256(json.dumps([content, dict(self.facts)]).encode()).hexdigest()

    def _part(self, name: str, each: str) -> Path:
        return self.folder / "parts" / name / f"{each}.parquet"

    def _key_of(self, name: str, each: str) -> str | None:
        file = self._part(name, each).with_suffix(".json")
        if not (file.is_file() and self._part(name, each).is_file()):
            return None
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["key"])
        except (ValueError, KeyError, TypeError):
            return None  # and so it is scored again

    def _keep(self, name: str, each: str, scores: SetScores, key: str) -> None:
        file = self._part(name, each)
        # The key comes last: a part without it does not count.
        file.with_suffix(".json").unlink(missing_ok=True)
        write_scores(file, {name: {each: scores}}, CLEAN)
        write_text_atomically(file.with_suffix(".json"), json.dumps({"key": key}) + "\n")


_STATE = {"fitted", "scores", "dataloader", "in_distribution", "name"}


def narrowed(loader: BatchLoader, positions: Tensor) -> BatchLoader:
    """Return a loader of some of another's images, else the same.

    Args:
        loader: The other.
        positions: ``(N,)``, some of its positions.
    """
    made = copy.copy(loader)
    made.positions = positions
    return made


def judge(scores: Scores) -> list[dict[str, str]]:
    """Return one row per detector and set that it is to tell from the clean test images, with its metrics.

    The training images are judged among themselves: which of them are poisoned.

    Args:
        scores: Detector -> set -> scores.
    """
    rows = []
    for name, sets in scores.items():
        for each, known in sets.items():
            if each == TRAIN:
                values, positives = known.score, known.poisoned
                assert positives is not None
                if bool(positives.all()) or not bool(positives.any()):
                    continue
            elif each == CLEAN or CLEAN not in sets:
                continue
            else:
                values = torch.cat([sets[CLEAN].score, known.score])
                positives = torch.arange(len(values)) >= len(sets[CLEAN].score)
            metrics = {key: f"{float(value):.6f}" for key, value in detection_metrics(values, positives).items()}
            counts = {"negatives": str(int((~positives).sum())), "positives": str(int(positives.sum()))}
            rows.append({"detector": name, "set": each, **counts, **metrics})
    return rows


def write_detection(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write ``detection.csv``.

    Args:
        path: The file.
        rows: Of :func:`judge`.
    """
    write_rows(path, _COLUMNS, rows)


def _flags(each: str, flags: Tensor) -> Tensor | None:
    """What belongs to no data set with a poison is out of distribution, not poisoned."""
    return flags if each in (CLEAN, POISONED, TRAIN) else None
