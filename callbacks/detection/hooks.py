"""When detectors work: fitted when testing or predicting starts, scored batch by batch, judged at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_bd.batch import RawBatch
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
        names = _set_names(trainer)
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
                session.fit(
                    lambda source: _fit_batches(trainer, pl_module, source, name), origin=_datamodule_of(trainer)
                )
            session.open()
            self._session, self._exits = session, exits.pop_all()

    def _drop(self) -> None:
        self._session = None

    def _take(self, trainer: Trainer, batch: object, number: int, *, judge: bool) -> None:
        if self._session is None:
            return
        images, labels, index, poisoned = _parts(batch)
        if judge and len(_set_names(trainer)) == 1 and poisoned is None:
            raise MisconfigurationException(
                f"`{type(self).__name__}` needs something to tell apart: test with several loaders, the first of them"
                " in-distribution, or with batches that say `is_poisoned`. To score only, use `Trainer.predict`."
            )
        self._session.take(number, images, labels, index, poisoned)

    def _collect(self, trainer: Trainer) -> None:
        if self._session is None:
            return
        names = _set_names(trainer)
        missing = [name for number, name in enumerate(names) if number not in self._session.numbers]
        if missing and trainer.testing:
            raise MisconfigurationException(f"The test set `{missing[0]}` has no image to score.")
        for number in self._session.numbers:
            known = _images_of(_loaders(trainer)[number][1], trainer.world_size)
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


def _loaders(trainer: Trainer) -> list[tuple[str, object]]:
    """Return the loaders of a test or prediction with the names of their places in dictionaries and lists."""
    return list(_flat("", trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders))


def _flat(name: str, loaders: object) -> Iterator[tuple[str, object]]:
    if isinstance(loaders, Mapping):
        for key, each in loaders.items():
            yield from _flat(f"{name}/{key}" if name else str(key), each)
    elif isinstance(loaders, list | tuple):
        for number, each in enumerate(loaders):
            yield from _flat(f"{name}/{number}" if name else f"set{number}", each)
    else:
        yield name or "set0", loaders


def _set_names(trainer: Trainer) -> list[str]:
    names = [name for name, _ in _loaders(trainer)]
    given = getattr(_datamodule_of(trainer), "test_set_names", None) if trainer.testing else None
    return list(given) if given is not None and len(given) == len(names) else names


def _datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """Return the datamodule of this call; ``trainer.datamodule`` may be that of an earlier one."""
    selector: Any = trainer._data_connector._datahook_selector
    datamodule: LightningDataModule | None = None if selector is None else selector.datamodule
    return datamodule


def _images_of(loader: object, processes: int) -> int | None:
    """Return the number of images of a loader whose sampler repeats some so that all processes have equally many."""
    if processes == 1 or not isinstance(loader, DataLoader) or not isinstance(loader.dataset, Sized):
        return None
    return len(loader.dataset)


def _parts(batch: object) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return images, labels, positions in the data set and flags of a batch; unknown labels are -1."""
    if isinstance(batch, Tensor):
        return batch, torch.full((len(batch),), -1), None, None
    if not isinstance(batch, Sequence) or not batch or not isinstance(batch[0], Tensor):
        raise MisconfigurationException(
            f"Detectors take batches of images and labels, `batch[0]` and `batch[1]`, but got {type(batch).__name__}."
        )
    images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.is_floating_point():
        labels = torch.full((len(images),), -1)
    index = getattr(batch, "index", None)
    return images, labels, index if isinstance(index, Tensor) else None, getattr(batch, "is_poisoned", None)


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


def _fit_batches(
    trainer: Trainer, pl_module: LightningModule, source: Iterable[Any] | None, name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels to fit on, on the module's device and in its precision; each process gets its share."""
    datamodule = _datamodule_of(trainer)
    if source is None:
        make = getattr(datamodule, "clean_fit_dataloader", None)
        if make is None:
            raise MisconfigurationException(
                f"`{name}` needs clean data to fit on. Pass `dataloader=...`, or test with a datamodule that has"
                " `clean_fit_dataloader()`."
            )
        loader: Iterable[Any] = _share(make(), trainer)
    else:
        loader = _share(source, trainer)
    convert = trainer.precision_plugin.convert_input
    for batch in loader:
        # A loader of the user's own knows nothing of the datamodule, unless it is one of the datamodule's.
        theirs = source is None or isinstance(batch, RawBatch)
        before, transfer, after = _transfer_hooks(pl_module, datamodule if theirs else None)
        images, labels, _, _ = _parts(after(transfer(before(batch, 0), pl_module.device, 0), 0))
        if bool((labels < 0).any()):
            raise MisconfigurationException(
                f"`{name}` is fitted on images and their labels, `batch[1]` being (B,) integers, but got none."
            )
        yield convert(images), labels


def _share(source: Iterable[Any], trainer: Trainer) -> Iterable[Any]:
    """Return this process's batches of a loader that does not share them out itself."""
    sampler = getattr(source, "sampler", None)
    if trainer.world_size == 1 or isinstance(sampler, DistributedSampler) or hasattr(source, "place"):
        return source
    if isinstance(source, Sized) and len(source) < trainer.world_size:
        raise MisconfigurationException(
            f"There are {len(source)} batches to fit on for {trainer.world_size} processes. Use smaller batches."
        )
    return islice(source, trainer.global_rank, None, trainer.world_size)


def _transfer_hooks(pl_module: LightningModule, datamodule: LightningDataModule | None) -> list[Any]:
    """Return the hooks that finish a batch, of whom Lightning would call them."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return [
        getattr(datamodule if datamodule is not None and is_overridden(hook, datamodule) else pl_module, hook)
        for hook in hooks
    ]
