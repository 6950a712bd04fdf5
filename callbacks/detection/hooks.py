"""When detectors work: fitted when testing or predicting starts, scored batch by batch, judged at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_bd.callbacks.detection.loaders import (
    datamodule_of,
    fit_batches,
    images_of,
    named_loaders,
    parts_of,
    set_names,
)
from lightning_bd.callbacks.detection.processes import gather_over_processes
from lightning_bd.functional.detection import detection_metrics

if TYPE_CHECKING:
    from lightning_bd.callbacks.detection.session import ScoringSession, SetScores

__all__ = ("DetectorHooks",)


class DetectorHooks(Callback):
    """The part of a detector that a Trainer sees.

    The first detector of a Trainer leads: it fits and scores for all, so that they share one forward pass.
    """

    name: str
    in_distribution: str | None
    #: Whether scores of one set can be compared with those of another.
    compares_sets: ClassVar[bool] = True

    @property
    def runs_model(self) -> bool:
        """Whether the model is run for it, beside the user's own passes."""
        raise NotImplementedError

    def __init__(self) -> None:
        #: Set -> its scores, after a test or prediction has ended.
        self.scores: dict[str, SetScores] = {}
        self._session: ScoringSession | None = None
        self._names: list[str] = []
        self._exits = ExitStack()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, unless that has been done, and start to look at the model."""
        self._start(trainer, pl_module)

    def on_test_batch_start(self, *_: object) -> None:
        """Forget the last forward pass."""
        if self._session is not None:
            self._session.skip()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch."""
        self._take(trainer, batch, dataloader_idx, judge=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how well each set is told from the in-distribution one."""
        self._collect(trainer)
        if self._session is not None:
            names = _numbered([detector.name for detector in _detectors(trainer)])
            for name, detector in zip(names, _detectors(trainer), strict=True):
                _judge(name, detector, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, unless that has been done, and start to look at the model."""
        self._start(trainer, pl_module)

    def on_predict_batch_start(self, *_: object) -> None:
        """Forget the last forward pass."""
        if self._session is not None:
            self._session.skip()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch."""
        self._take(trainer, batch, dataloader_idx, judge=False)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scores."""
        self._collect(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the model."""
        self._exits.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing on the model."""
        self._exits.close()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Sessions know all kinds of detectors, which have these hooks.
        from lightning_bd.callbacks.detection.session import ScoringSession

        self.scores = {}
        detectors = _detectors(trainer)
        if detectors[0] is not self:
            return
        names = self._names = set_names(trainer)
        wanted = {d.in_distribution for d in detectors} - {None, *names}
        if wanted and trainer.testing:
            raise MisconfigurationException(
                f"There is no test set `{wanted.pop()}`, which `in_distribution` names; there are {', '.join(names)}."
                " (Sets are named by a dictionary of loaders.)"
            )
        if any(d.runs_model for d in detectors) and not is_overridden("forward", pl_module, LightningModule):
            raise MisconfigurationException(
                f"`{type(pl_module).__name__}` has no `forward`, which detectors call to be fitted, or to look at"
                " changed images: let it map images to logits."
            )
        # What is fitted must not be an inference tensor; compiled parts would not call the hooks.
        with torch.inference_mode(False), ExitStack() as exits:
            exits.enter_context(torch.compiler.set_stance("force_eager"))
            session = ScoringSession(
                pl_module,
                detectors,
                trainer.precision_plugin.forward_context,
                every=(trainer.global_rank, trainer.world_size),
            )
            exits.callback(self._drop)
            exits.callback(session.close)
            # A loader draws from the global stream.
            with isolate_rng():
                name = type(self).__name__
                session.fit(lambda source: fit_batches(trainer, pl_module, source, name), origin=datamodule_of(trainer))
            session.open()
            self._session, self._exits = session, exits.pop_all()

    def _drop(self) -> None:
        self._session = None

    def _take(self, trainer: Trainer, batch: object, number: int, *, judge: bool) -> None:
        if self._session is None:
            return
        images, labels, index, poisoned = parts_of(batch)
        if judge and len(self._names) == 1 and poisoned is None:
            raise MisconfigurationException(
                f"`{type(self).__name__}` needs something to tell apart: test with several loaders, the first of them"
                " in-distribution, or with batches that say `is_poisoned`. To score only, use `Trainer.predict`."
            )
        self._session.take(number, images, labels, index, poisoned)

    def _collect(self, trainer: Trainer) -> None:
        if self._session is None:
            return
        names = self._names
        missing = [name for number, name in enumerate(names) if number not in self._session.numbers]
        if missing and trainer.testing:
            raise MisconfigurationException(f"The test set `{missing[0]}` has no image to score.")
        for number in self._session.numbers:
            known = images_of(named_loaders(trainer)[number][1], trainer.world_size)
            for detector, scores in self._session.result(number).items():
                detector.scores[names[number]] = _gathered(scores, trainer.strategy.root_device, known)


def _judge(name: str, detector: DetectorHooks, pl_module: LightningModule) -> None:
    names = list(detector.scores)
    base = detector.in_distribution or names[0]
    for other in names:
        known = detector.scores[other]
        if known.poisoned is not None and bool(known.poisoned.any()) and not bool(known.poisoned.all()):
            scores, positives = known.score, known.poisoned
        elif other != base and detector.compares_sets:
            first = detector.scores[base]
            scores = torch.cat([first.score, known.score])
            positives = torch.cat([torch.zeros(len(first.score)), torch.ones(len(known.score))]).bool()
        else:
            continue
        found = {key: value.float().to(pl_module.device) for key, value in detection_metrics(scores, positives).items()}
        for key, value in found.items():
            # All processes have the same; Lightning warns unless it may combine them.
            pl_module.log(f"{name}/{other}/{key}", value, sync_dist=True)


def _detectors(trainer: Trainer) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, DetectorHooks)]  # type: ignore[attr-defined]


def _numbered(names: Sequence[str]) -> list[str]:
    """Tell detectors of one name apart: ``ctm``, ``ctm_2``."""
    found: list[str] = []
    for name in names:
        count = sum(1 for other in names[: len(found)] if other == name)
        found.append(name if not count else f"{name}_{count + 1}")
    return found


def _gathered(scores: SetScores, device: torch.device, known: int | None) -> SetScores:
    """Return the scores of all processes, without what a sampler has repeated."""

    def gather(rows: Tensor) -> Tensor:
        return gather_over_processes(rows.to(device)).cpu()

    index = gather(scores.index)
    real = index < known if known is not None else torch.ones(len(index), dtype=torch.bool)
    return replace(
        scores,
        index=index[real],
        label=gather(scores.label)[real],
        prediction=gather(scores.prediction)[real],
        poisoned=None if scores.poisoned is None else gather(scores.poisoned)[real],
        score=gather(scores.score)[real],
    )
