"""Fitting and scoring with several detectors, on one forward pass for all that look at features."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection.base import DatasetDetector, Detector, FeatureDetector, InputDetector
from lightning_bd.callbacks.detection.features import Features, FeatureTap
from lightning_bd.callbacks.detection.processes import gather_over_processes, share_of_process
from lightning_bd.functional.digest import weights_sha256
from lightning_bd.functional.modes import mode

__all__ = ("Batches", "ScoringSession", "SetScores")

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SetScores:
    """One detector's scores of one set of images, on the CPU.

    Attributes:
        index: ``(N,)`` int64, position of each image in its data set.
        label: ``(N,)`` int64, the label that came with it.
        prediction: ``(N,)`` int64, what the model says.
        poisoned: ``(N,)`` bool, or ``None`` where that is not known.
        score: ``(N,)`` float32, higher is more suspicious.
    """

    index: Tensor
    label: Tensor
    prediction: Tensor
    poisoned: Tensor | None
    score: Tensor


@dataclass
class _Rows:
    """What is kept of one set while it passes."""

    index: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    prediction: list[Tensor] = field(default_factory=list)
    poisoned: list[Tensor] = field(default_factory=list)
    scores: dict[Detector, list[Tensor]] = field(default_factory=dict)
    # By layer: those of the detectors that look at a whole data set.
    features: dict[str | None, list[Tensor]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(len(part) for part in self.index)


class ScoringSession:
    """Scores batches with several detectors while the model passes over them.

    Features and logits are read off the model's own forward pass; whoever runs the model calls :meth:`take` after each
    batch. Detectors that change the images run the model themselves.

    Args:
        model: The classifier.
        detectors: The detectors.
        forward_context: Makes the context of a forward pass, for mixed precision.
        on_failure: Called with a detector and its exception; the others go on without it. ``None``: it is raised.
        every: Rank and number of the processes that take turns with the images; for positions that no batch tells.
    """

    def __init__(
        self,
        model: nn.Module,
        detectors: Sequence[Detector],
        forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        on_failure: Callable[[Detector, Exception], None] | None = None,
        every: tuple[int, int] = (0, 1),
    ) -> None:
        self._model = model
        self._detectors = list(detectors)
        self._context = forward_context
        self._on_failure = on_failure
        self._every = every
        self._rows: dict[int, _Rows] = {}
        self._taps: dict[str | None, FeatureTap] = {}
        for layer in dict.fromkeys(d.layer for d in detectors):
            with self._failing(layer):
                self._taps[layer] = FeatureTap(model, layer)
        for detector in self._detectors:
            if detector.uses_head and not detector.needs_fit:
                detector.forget()  # of a model's head, which costs nothing to read again

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """Those that have not failed."""
        return tuple(self._detectors)

    def fit(self, batches: Callable[[Iterable[Any] | None], Batches], origin: object = None) -> None:
        """Fit those detectors that need it and have not been fitted to the model's present weights on the same data.

        Those with the same data share one pass.

        Args:
            batches: Given a detector's ``dataloader``, returns its batches on the model's device.
            origin: Where the data come from if a detector has no ``dataloader``.
        """

        def source_of(detector: Detector) -> object:
            return origin if detector.dataloader is None else detector.dataloader

        fitted = [d for d in self._detectors if d.needs_fit]
        if not fitted:
            return
        weights = weights_sha256(self._model.state_dict())
        waiting = [d for d in fitted if not d.knows(weights, source_of(d))]
        features = [d for d in waiting if isinstance(d, FeatureDetector)]
        for source in {id(d.dataloader): d.dataloader for d in features}.values():
            self._fit_features([d for d in features if d.dataloader is source], batches(source))
        for detector in waiting:
            if isinstance(detector, InputDetector):
                self._attempt(detector, partial(self._fit_input, detector, batches))
        for detector in waiting:
            if detector in self._detectors:
                detector.note_fit(weights, source_of(detector))

    def open(self) -> None:
        """Start to look at the model's forward passes."""
        for tap in self._taps.values():
            tap.open()

    def close(self) -> None:
        """Stop it, and leave nothing on the model; may be called again."""
        for tap in self._taps.values():
            tap.close()

    def skip(self) -> None:
        """Forget the last forward pass, before the next."""
        for tap in self._taps.values():
            tap.skip()

    @torch.no_grad()
    def take(
        self,
        number: int,
        images: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
        poisoned: Tensor | None = None,
    ) -> None:
        """Score the batch that the model has just passed.

        Args:
            number: Which set it is of.
            images: ``(B, C, H, W)`` in [0, 1].
            labels: ``(B,)``, integers.
            index: ``(B,)``, positions in the data set; counted if not given.
            poisoned: ``(B,)`` bool, if known.
        """
        # All are read before any detector runs the model again.
        seen = self._seen(len(images))
        if not self._detectors:
            return
        rows = self._rows.setdefault(number, _Rows())
        if index is None:
            rank, processes = self._every
            index = torch.arange(rows.count, rows.count + len(images)) * processes + rank
        rows.index.append(index.cpu())
        rows.label.append(labels.cpu())
        rows.prediction.append(next(iter(seen.values())).logits.argmax(dim=1).cpu())
        if poisoned is not None:
            rows.poisoned.append(poisoned.cpu())
        for layer in {d.layer for d in self._detectors if isinstance(d, DatasetDetector)}:
            rows.features.setdefault(layer, []).append(seen[layer].features.cpu())
        self.close()  # not to listen to the passes of the input detectors
        for detector in tuple(self._detectors):
            if isinstance(detector, FeatureDetector) and not detector.is_ready and not detector.needs_fit:
                self._attempt(detector, partial(self._give_head, detector))
        for detector in tuple(self._detectors):
            if not isinstance(detector, DatasetDetector):
                self._attempt(detector, partial(self._score, detector, rows, seen[detector.layer], images))
        self.open()

    @property
    def numbers(self) -> list[int]:
        """Numbers of the sets that have had an image."""
        return list(self._rows)

    def result(self, number: int) -> dict[Detector, SetScores]:
        """Return each detector's scores of one set, and forget the set.

        Detectors of whole data sets score it now, the images of all processes together; all processes call it.

        Args:
            number: Which set.
        """
        if number not in self._rows:
            return {}
        rows = self._rows.pop(number)
        index, label, prediction = torch.cat(rows.index), torch.cat(rows.label), torch.cat(rows.prediction)
        poisoned = torch.cat(rows.poisoned) if rows.poisoned else None
        for detector in tuple(self._detectors):
            if isinstance(detector, DatasetDetector):
                self._attempt(detector, partial(self._score_set, detector, rows, label))
        return {
            detector: SetScores(index, label, prediction, poisoned, torch.cat(rows.scores[detector]))
            for detector in self._detectors
        }

    def run(
        self, number: int, batch: Sequence[Tensor], index: Tensor | None = None, poisoned: Tensor | None = None
    ) -> None:
        """Pass the model over a batch and score it, where no one else does.

        Args:
            number: Which set it is of.
            batch: Images and labels.
            index: ``(B,)``, positions in the data set.
            poisoned: ``(B,)`` bool, if known.
        """
        self.open()
        try:
            self.skip()
            with torch.no_grad(), mode(self._model, training=False), self._context():
                self._model(batch[0])
            self.take(number, batch[0], batch[1], index, poisoned)
        finally:
            self.close()

    def _fit_features(self, detectors: Sequence[FeatureDetector], batches: Batches) -> None:
        self.open()
        try:
            started = False
            with mode(self._model, training=False), torch.no_grad():
                for images, labels in batches:
                    self.skip()
                    with self._context():
                        self._model(images)
                    seen = self._seen(len(images))
                    if not started:
                        for d in detectors:
                            if d in self._detectors:
                                self._attempt(d, partial(d.begin_fit, self._taps[d.layer].head))
                        started = True
                    for d in detectors:
                        if d in self._detectors:
                            self._attempt(d, partial(d.update_fit, *seen[d.layer], labels))
            for d in detectors:
                if d in self._detectors:
                    self._attempt(d, d.finish_fit if started else _no_data)
        finally:
            self.close()

    def _fit_input(self, detector: InputDetector, batches: Callable[[Iterable[Any] | None], Batches]) -> None:
        detector.fit(self._model, batches(detector.dataloader))

    def _give_head(self, detector: FeatureDetector) -> None:
        detector.begin_fit(self._taps[detector.layer].head)
        detector.finish_fit()

    def _score(self, detector: Detector, rows: _Rows, seen: Features, images: Tensor) -> None:
        if isinstance(detector, FeatureDetector):
            scores = detector.score(seen.features, seen.logits)
        else:
            assert isinstance(detector, InputDetector)
            with self._context():
                scores = detector.score(self._model, images)
        rows.scores.setdefault(detector, []).append(_checked(detector, scores, len(images)))

    def _score_set(self, detector: DatasetDetector, rows: _Rows, labels: Tensor) -> None:
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        features = torch.cat(rows.features[detector.layer])
        everything = gather_over_processes(features.to(device)).cpu()
        scores = detector.score(everything, gather_over_processes(labels.to(device)).cpu())
        scores = _checked(detector, scores, len(everything))
        rows.scores[detector] = [share_of_process(scores, len(labels), device)]

    def _seen(self, count: int) -> dict[str | None, Features]:
        """Read the taps; where that fails, the detectors of the layer fail."""
        seen = {}
        for layer, tap in self._taps.items():
            if any(d.layer == layer for d in self._detectors):
                with self._failing(layer):
                    seen[layer] = tap.take(count)
        return seen

    @contextmanager
    def _failing(self, layer: str | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._on_failure is None:
                raise
            for detector in [d for d in self._detectors if d.layer == layer]:
                self._detectors.remove(detector)
                self._on_failure(detector, error)

    def _attempt(self, detector: Detector, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            if self._on_failure is None:
                raise
            self._detectors.remove(detector)
            self._on_failure(detector, error)


def _checked(detector: Detector, scores: Tensor, count: int) -> Tensor:
    if scores.shape != (count,) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"`{type(detector).__name__}` gave scores of shape {tuple(scores.shape)} for {count} images, or some that"
            " are not finite."
        )
    return scores.cpu()


def _no_data() -> None:
    raise ValueError("Expected clean data to fit on, but got no batch. (An iterator may be exhausted.)")
