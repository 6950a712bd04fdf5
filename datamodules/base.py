"""What every image datamodule does: splits, phases, poison and loaders."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_bd.batch import AttackBatch, BatchContext, RawBatch, Sample
from lightning_bd.datamodules.defender import DefenderView
from lightning_bd.datamodules.excluded import excluded_positions
from lightning_bd.datamodules.images import ImageSet, hold
from lightning_bd.datamodules.loader import Augment, BatchLoader, Place, place_of
from lightning_bd.datamodules.loader_factory import LoaderFactory
from lightning_bd.datamodules.phase_data import PhaseData
from lightning_bd.datamodules.rendering import as_precision, render
from lightning_bd.datamodules.splits import stratified_subset
from lightning_bd.datamodules.training_poison import TrainingPoison
from lightning_bd.datamodules.training_splits import TrainingSplits
from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison

__all__ = ("ImageDataModule", "PhaseData")


class ImageDataModule(LightningDataModule):
    """Base of the image datamodules; a subclass says only how to :meth:`load` its images.

    Images are float32 in [0, 1]; normalisation belongs to the model. A datamodule used without phases trains on
    all splits together, poisoned if ``poison`` is given.

    Args:
        poison: The attacker's rule; ``None`` for clean data and no attack test set.
        splits: Share of the training set per named split, disjoint, stratified by class. A split named ``val`` is
            what ``val_dataloader`` yields, and not trained on unless named. ``None``: one split ``train``.
        batch_size: Images per batch and process, where a phase does not say.
        subset: Use only this many training images, classes in proportion.
        test_subset: Use only this many test images, classes in proportion; rates are then less certain.
        augment: ``"crop"``: random crop after padding by an eighth of the height; ``"crop_flip"``: and mirrored at
            random; ``"none"``. ``None``: what is usual for the data set.
        batch_format: ``"sample"`` yields :class:`~lightning_bd.batch.Sample`; ``"pair"`` yields ``(image, label)``
            for modules that do ``x, y = batch``.
        split_seed: Seed of splits and subset, its own so that they stay when the run's seed changes.
        seed: Seed of order, augmentation and dynamic poison; ``None``: the one given to ``seed_everything``, else 0.
        num_workers: Processes that decode images which are too large for memory.
        in_memory: Decode all images once (``True``) or as batches need them (``False``); ``None`` decides by size.
        exclude: Training images that are trained on no more, by position after ``subset`` (``Sample.index``), or a file
            of them that names its data set (:func:`~lightning_bd.datamodules.excluded.write_excluded`). The attacker
            came first: splits and static poison are those of the whole set. The split ``val`` is evaluated as a whole.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When loaded, if the file is broken or of another data set, or if all images of a
            split or class are excluded.
    """

    default_augment: ClassVar[Augment] = "crop_flip"

    def __init__(
        self,
        poison: Poison | None = None,
        splits: dict[str, float] | None = None,
        batch_size: int = 128,
        subset: int | None = None,
        augment: Augment | None = None,
        batch_format: Literal["sample", "pair"] = "sample",
        split_seed: int = 0,
        seed: int | None = None,
        num_workers: int = 0,
        in_memory: bool | None = None,
        test_subset: int | None = None,
        exclude: str | Path | list[int] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be a positive integer, but got {batch_size}.")
        if num_workers < 0:
            raise ValueError(f"Expected argument `num_workers` to be a non-negative integer, but got {num_workers}.")
        self.poison = poison
        self.splits: Mapping[str, float] = splits if splits is not None else {"train": 1.0}
        self.batch_size = batch_size
        self.subset = subset
        self.test_subset = test_subset
        self.augment: Augment = augment if augment is not None else self.default_augment
        self.batch_format = batch_format
        self.split_seed = split_seed
        self.seed = seed
        self.num_workers = num_workers
        self.in_memory = in_memory
        self.exclude = exclude
        self.phase = PhaseData(poison=poison.mode if poison is not None else None)
        self.reference: PhaseData | None = None
        #: Whether batches of the current phase's dynamic poison are :class:`~lightning_bd.batch.AttackBatch`; set by a
        #: model that trains the trigger, for the time of its fit.
        self.keeps_clean_images = False
        #: The splits that a trigger is learnt from; ``None``: those of the first phase that is poisoned.
        self.learns_from: tuple[str, ...] | None = None
        self._train: ImageSet | None = None
        self._test: ImageSet | None = None
        self._cut: TrainingSplits | None = None
        self._cached_attack: TrainingPoison | None = None
        self._source: ImageSet | None = None
        self._fingerprint: str | None = None
        #: What :meth:`replace_poison` was given: which images a model saw poisoned.
        self.record: PoisonManifest | None = None

    def load(self, train: bool) -> ImageSet:
        """Return the training or the test images; subclasses implement this."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the images once, cut the splits and check the poison against them."""
        if self._train is not None:
            return
        train = self.load(train=True)
        if self.subset is not None:
            train = train.select(stratified_subset(train.labels, self.subset, self.split_seed))
        self._source = train
        excluded = excluded_positions(self.exclude, len(train), self.fingerprint)
        self._cut = TrainingSplits(train.labels, self.splits, self.split_seed, excluded, type(self).__name__)
        if self.poison is not None:
            self.poison.prepare(train.image_shape, len(train.class_names))
        test = self.load(train=False)
        if self.test_subset is not None:
            test = test.select(stratified_subset(test.labels, self.test_subset, self.split_seed, "test_subset"))
        self._train, self._test = hold(train, self.in_memory), hold(test, self.in_memory)

    @property
    def train_images(self) -> ImageSet:
        """The training images, after ``subset``."""
        self.setup()
        assert self._train is not None
        return self._train

    @property
    def test_images(self) -> ImageSet:
        """The test images."""
        self.setup()
        assert self._test is not None
        return self._test

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.train_images.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of every image."""
        return self.train_images.image_shape

    @property
    def excluded(self) -> Tensor:
        """Positions ``(E,)`` of the training images that are trained on no more, sorted."""
        return self._training_splits.excluded

    def replace_poison(self, poison: Poison | None, manifest: PoisonManifest | None = None) -> None:
        """Evaluate, or train the phases to come, with another poison.

        Args:
            poison: The new rule; ``None``: the attack is not known, and no triggered images are made.
            manifest: The record of a model whose attack it is; :meth:`stored_dataloader` poisons the images it lists.

        Raises:
            ValueError: If it does not fit the images or classes.
        """
        self.setup()
        if poison is not None:
            poison.prepare(self.image_shape, self.num_classes)
        self.poison, self.record, self._cached_attack = poison, manifest, None

    def learn_trigger(self) -> None:
        """Let the attacker learn a trigger that is made from images, if no poisoned phase was there to do so before.

        From ``learns_from``, else from all splits but ``val``.
        """
        self._learn_trigger(())

    def restore_trigger(self, poison: Poison) -> None:
        """Give a trigger that is made from images what a record of these images says; nothing, here.

        Args:
            poison: The rule; its trigger has yet to be learnt.

        Raises:
            MisconfigurationException: If it must not be learnt from these images.
        """

    def craft(self, phase: PhaseData) -> None:
        """Make the images that a phase's crafting puts in the place of others; they wait on disk for other processes.

        Args:
            phase: The phase; nothing is made if it is not static.
        """
        if phase.poison == "static" and self.poison is not None and self.poison.crafting is not None:
            self._train_loader(phase)

    def fingerprint(self) -> str:
        """Return the SHA-256 hex digest of the training set, computed once; ``in_memory`` does not change it."""
        if self._source is None:
            self.setup()
        if self._fingerprint is None:
            assert self._source is not None
            self._fingerprint = self._source.fingerprint()
        return self._fingerprint

    def positions(self, splits: tuple[str, ...]) -> Tensor:
        """Return the sorted positions of the images to train on in ``splits``; empty means all splits but ``val``.

        Raises:
            MisconfigurationException: If a split does not exist.
        """
        return self._training_splits.positions(splits)

    def set_phase(self, phase: PhaseData, reference: PhaseData | None = None) -> None:
        """Choose what ``train_dataloader`` yields from now on.

        Args:
            phase: The phase that is about to train.
            reference: The phase whose model it starts from; what :meth:`reference_batches` replays.

        Raises:
            MisconfigurationException: If a split does not exist, or a poisoned phase has no poison.
            ValueError: If the poison selects no image.
        """
        self._check_phase(phase)
        self.phase, self.reference = phase, reference

    def train_dataloader(self) -> BatchLoader:
        """Return the loader of the current phase's split: shuffled, augmented, poisoned if the phase is."""
        return self._train_loader(self.phase)

    def val_dataloader(self) -> list[BatchLoader]:
        """Return clean and triggered loaders of the split ``val``; none without such a split."""
        cut = self._training_splits.cut
        self.learn_trigger()
        return self.loaders.evaluation(self.train_images, cut["val"], "val") if "val" in cut else []

    def test_dataloader(self) -> list[BatchLoader]:
        """Return the clean test set and, with a poison, the test images it aims at, all triggered."""
        self.learn_trigger()
        return self.loaders.evaluation(self.test_images, torch.arange(len(self.test_images)), "test")

    @property
    def test_set_names(self) -> list[str]:
        """What the loaders of :meth:`test_dataloader` hold: ``clean`` and, with a poison, ``poisoned``."""
        return ["clean"] if self.poison is None else ["clean", "poisoned"]

    def predict_dataloader(self) -> BatchLoader:
        """Return the clean test set."""
        return self.loaders.clean(self.test_images, "test")

    def clean_fit_dataloader(self) -> BatchLoader:
        """Return the current phase's split, clean, unshuffled, not augmented: what detectors are fitted on."""
        return self.loaders.clean(self.train_images, "clean_fit", self.positions(self.phase.splits))

    def stored_dataloader(self, phase: PhaseData) -> BatchLoader:
        """Return a phase's images as they lie in its data set: poisoned if static, unshuffled, not augmented.

        Args:
            phase: The phase; of a dynamic poison nothing lies in the data set, and its images are clean.

        Raises:
            ValueError: If the record of :meth:`replace_poison` lists poisoned images of other data, or is broken.
        """
        return self._train_loader(phase, train=False)

    def clean_batches(self, purpose: str, epoch: int = 0, device: torch.device | str = "cpu") -> Iterator[Sample]:
        """Yield one epoch of the current phase's images, augmented and clean, in an order of its own.

        Under several processes each gets its share.

        Args:
            purpose: What for; part of the key of order and augmentation.
            epoch: The epoch, part of the key too.
            device: Where the batches are made.
        """
        phase = replace(self.phase, name=f"{self.phase.name} ({purpose})", poison=None)
        for raw in self._epoch(phase, epoch, device):
            yield self._rendered(raw, None)

    def reference_batches(
        self, device: torch.device | str = "cpu", clean: bool = False
    ) -> Iterator[Sample | tuple[Tensor, Tensor]]:
        """Replay one epoch of the phase that the current one started from, as its model saw it.

        Augmented, and poisoned if that phase was. Under several processes each gets its share.

        Args:
            device: Where the batches are made.
            clean: Leave the poison out.

        Raises:
            MisconfigurationException: If the current phase does not start from another.
        """
        if self.reference is None:
            raise MisconfigurationException(
                "This phase starts from no other phase, so there is no earlier data to replay. Set the phase's "
                "`start_from`, or give the callback its own `dataloader`."
            )
        phase = replace(self.reference, name=f"{self.reference.name} (replayed)")
        for raw in self._epoch(replace(phase, poison=None) if clean else phase, 0, device):
            batch = self.on_after_batch_transfer(raw, 0)
            assert not isinstance(batch, AttackBatch), "only the current phase's batches are"
            yield batch

    def defender_view(self, phase: PhaseData, validation: float = 0.2) -> DefenderView:
        """Return what a defender may see: the clean images of the phase's split and nothing else.

        Args:
            phase: The defending phase.
            validation: Share of the split that is held out for validation, in (0, 1).
        """
        if phase.poison is not None:
            raise MisconfigurationException(f"Phase `{phase.name}` defends, so it cannot be `poisoned`.")
        return DefenderView(
            self.train_images.select(self.positions(phase.splits)),
            batch_size=phase.batch_size or self.batch_size,
            augment=self.augment,
            seed=self.run_seed,
            phase=phase.name,
            validation=validation,
            num_workers=self.num_workers,
        )

    def manifest(self, phases: tuple[PhaseData, ...] = (), learn: bool = True) -> PoisonManifest | None:
        """Describe the poison for whoever evaluates the model later; ``None`` without one.

        Args:
            phases: The phases of the run; the positions of each are listed whose images are chosen once.
            learn: Whether a trigger that is learnt from images is learnt for it; else it is described without pixels.
        """
        attack = self._attack
        if attack is None:
            return None
        if learn:
            self.learn_trigger()
        listed = ((phase.name, attack.listed(phase)) for phase in phases)
        chosen = {name: positions for name, positions in listed if positions is not None}
        return PoisonManifest.describe(attack.rule, self._facts(), chosen, self.image_shape)

    def on_after_batch_transfer(
        self, batch: object, dataloader_idx: int
    ) -> Sample | AttackBatch | tuple[Tensor, Tensor]:
        """Finish a raw batch on its device: trigger, augmentation, [0, 1]."""
        if not isinstance(batch, RawBatch):
            raise TypeError(f"Expected a batch of this datamodule's loaders, but got {type(batch).__name__}.")
        context = batch.context
        is_trained_on = context.train and (context.phase, context.poison) == (self.phase.name, "dynamic")
        if self.keeps_clean_images and is_trained_on:
            finished, clean = self._rendered(batch, self.poison), self._rendered(batch, None)
            none = batch.indices[:0]
            rows = (none if part is None else part for part in (batch.poison_rows, batch.cover_rows))
            return AttackBatch(*finished, clean.image, *rows)
        sample = self._rendered(batch, self.poison)
        return sample if self.batch_format == "sample" else (sample.image, sample.label)

    @property
    def run_seed(self) -> int:
        """The seed of all draws: ``seed``, else the one given to ``seed_everything``, else 0."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    @property
    def loaders(self) -> LoaderFactory:
        """Makes loaders whose batches :meth:`on_after_batch_transfer` finishes."""
        return LoaderFactory(
            self.poison, self.batch_size, self.run_seed, self.augment, self._padding, self._place, self.num_workers
        )

    def _rendered(self, batch: RawBatch, poison: Poison | None) -> Sample:
        sample = render(batch, poison, self._padding)
        return sample._replace(image=as_precision(sample.image, self.trainer))

    @property
    def _padding(self) -> int:
        return max(1, self.image_shape[1] // 8)

    def _place(self) -> Place:
        return place_of(self.trainer)

    @property
    def _training_splits(self) -> TrainingSplits:
        self.setup()
        assert self._cut is not None
        return self._cut

    @property
    def _attack(self) -> TrainingPoison | None:
        """What ``poison`` does to the training set; anew when ``poison`` is another one."""
        if self.poison is None:
            return None
        if self._cached_attack is None or self._cached_attack.rule is not self.poison:
            self._cached_attack = TrainingPoison(self.poison, self._training_splits, self.train_images.read)
        return self._cached_attack

    def _check_phase(self, phase: PhaseData) -> None:
        self.positions(phase.splits)
        if phase.poison is None:
            return
        attack = self._attack
        if attack is None:
            raise MisconfigurationException(f"Phase `{phase.name}` is poisoned, but `data.poison` is not set.")
        attack.check(phase)
        self._learn_trigger(phase.splits)

    def _learn_trigger(self, splits: tuple[str, ...]) -> None:
        attack = self._attack
        if attack is None:
            return
        if not attack.rule.is_learned:
            self.restore_trigger(attack.rule)
        attack.learn_trigger(splits if self.learns_from is None else self.learns_from)

    def _train_loader(self, phase: PhaseData, train: bool = True) -> BatchLoader:
        self._check_phase(phase)
        if not train and phase.poison == "dynamic":
            phase = replace(phase, poison=None)
        context = BatchContext(phase.name, phase.poison, phase.poison or "dynamic", train=train)
        loader = self.loaders.loader(self.train_images, self.positions(phase.splits), context, phase.batch_size)
        attack = self._attack
        if attack is not None:
            recorded = None if train or phase.poison is None else self._recorded(phase)
            attack.apply(loader, phase, recorded)
        return loader

    def _epoch(self, phase: PhaseData, epoch: int, device: torch.device | str) -> Iterator[RawBatch]:
        """Yield this process's share of one epoch, whichever the Trainer is in."""
        loader, here = self._train_loader(phase), self._place()
        loader.place = lambda: Place(epoch, here.rank, here.world_size)
        for raw in loader:
            yield raw.to(device)

    def _recorded(self, phase: PhaseData) -> Tensor | None:
        """Return the images that a model saw poisoned in a phase, if its record lists them."""
        chosen = None if self.record is None else self.record.chosen(phase.name)
        if chosen is not None and self.record is not None:
            self.record.check_same_images(phase.name, self._facts())
        return chosen

    def _facts(self) -> dict[str, str | int]:
        """Describe the training set for a record."""
        facts: dict[str, str | int] = {
            "name": type(self).__name__,
            "sha256": self.fingerprint(),
            "images": len(self.train_images),
            "classes": self.num_classes,
        }
        return facts | ({"excluded": len(self.excluded)} if len(self.excluded) else {})
