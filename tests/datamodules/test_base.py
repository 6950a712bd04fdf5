"""The datamodule on the digits: phases, poison, loaders, replay."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_bd.batch import PoisonMode, Sample
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule, PhaseData
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.label_maps import SourceSpecific
from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

# Lightning 2.6 on torch 2.15.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SPLITS = {"inject": 0.7, "consolidate": 0.2, "val": 0.1}
INJECT = PhaseData("inject", ("inject",), "dynamic")
CONSOLIDATE = PhaseData("consolidate", ("consolidate",))


def digits(rate: float = 0.3, seed: int | None = 0, batch_size: int = 128, cover_rate: float = 0.0) -> DigitsDataModule:
    poison = Poison(BadNets(size=2, pattern="white"), rate, cover_rate=cover_rate)
    return DigitsDataModule(poison, SPLITS, batch_size, augment="crop_flip", seed=seed)


def finished(data: ImageDataModule, loader: Iterable[object]) -> Sample:
    """Return one epoch of a loader as one large sample."""
    samples = [cast(Sample, data.on_after_batch_transfer(batch, 0)) for batch in loader]
    return Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))


def share_with_trigger(images: Tensor) -> float:
    """Return the share of images with a white patch in the corner, which no digit has after augmentation."""
    return float((images[:, :, -2:, -2:] == 1).all(dim=(1, 2, 3)).double().mean()) if len(images) else 0.0


def replayed(data: ImageDataModule) -> Sample:
    samples = [cast(Sample, batch) for batch in data.reference_batches()]
    return Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))


def assert_equal(one: Sample, other: Sample) -> None:
    for name, mine, theirs in zip(Sample._fields, one, other, strict=True):
        assert torch.equal(mine, theirs), name


def test_a_phase_trains_on_its_split() -> None:
    data = digits()
    seen = {}
    for phase in (INJECT, CONSOLIDATE):
        data.set_phase(phase)
        sample = finished(data, data.train_dataloader())
        seen[phase.name] = set(sample.index.tolist())
        positions = set(data.positions(phase.splits).tolist())
        assert seen[phase.name] <= positions
        assert len(positions) - len(seen[phase.name]) <= 1
        assert sample.is_poisoned.any() == (phase.poison is not None)
        assert torch.equal(sample.original_label, data.train_images.labels[sample.index])
    assert not seen["inject"] & seen["consolidate"]


def test_joined_splits_are_the_union() -> None:
    data = digits()
    joined = data.positions(("consolidate", "inject"))
    apart = torch.cat([data.positions(("inject",)), data.positions(("consolidate",))])
    assert torch.equal(joined, apart.sort().values)
    assert len(data.positions(())) == len(data.train_images) - len(data.positions(("val",)))


def test_dynamic_rate_and_labels() -> None:
    data = digits(rate=0.3)
    data.set_phase(INJECT)
    sample = finished(data, data.train_dataloader())
    # About 1,000 draws: standard deviation 0.0145.
    assert abs(float(sample.is_poisoned.double().mean()) - 0.3) < 0.06
    assert (sample.label[sample.is_poisoned] == 0).all()
    assert torch.equal(sample.label[~sample.is_poisoned], sample.original_label[~sample.is_poisoned])
    assert share_with_trigger(sample.image[sample.is_poisoned]) == 1
    assert share_with_trigger(sample.image[~sample.is_poisoned]) == 0


def test_static_poison_is_fixed_and_augmented() -> None:
    data = digits(rate=0.1)
    phase = replace(INJECT, poison="static")
    data.set_phase(phase)
    first = finished(data, data.train_dataloader())
    data.set_phase(replace(phase, name="again"))
    second = finished(data, data.train_dataloader())
    poisoned = [set(sample.index[sample.is_poisoned].tolist()) for sample in (first, second)]
    assert poisoned[0] == poisoned[1]
    assert len(poisoned[0]) == int(0.1 * len(data.positions(("inject",))))
    # The crop moves the patch, as it moves all of a stored image.
    assert share_with_trigger(first.image[first.is_poisoned]) < 0.6


def test_the_seed_decides_the_epoch() -> None:
    data = digits()
    data.set_phase(INJECT)
    assert_equal(finished(data, data.train_dataloader()), finished(data, data.train_dataloader()))
    other = digits(seed=1)
    other.set_phase(INJECT)
    assert not torch.equal(
        finished(data, data.train_dataloader()).index, finished(other, other.train_dataloader()).index
    )


def test_the_seed_of_the_run_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert digits(seed=None).run_seed == 7
    assert digits(seed=3).run_seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert digits(seed=None).run_seed == 0


def test_splits_stay_when_the_seed_changes() -> None:
    assert torch.equal(digits(seed=0).positions(("inject",)), digits(seed=5).positions(("inject",)))
    moved = DigitsDataModule(splits=SPLITS, split_seed=1).positions(("inject",))
    assert not torch.equal(digits().positions(("inject",)), moved)


def test_a_loader_keeps_its_rule() -> None:
    data = digits()
    data.set_phase(INJECT)
    loader = data.train_dataloader()
    expected = finished(data, data.train_dataloader())
    data.set_phase(CONSOLIDATE, INJECT)
    assert_equal(finished(data, loader), expected)
    assert not finished(data, data.train_dataloader()).is_poisoned.any()


def test_a_poison_that_is_set_later_is_the_one_that_counts() -> None:
    """Its trigger, its labels, its images and its record, and none of the old one's."""
    data, static = digits(rate=0.1), replace(INJECT, poison="static")
    before = data.manifest((static,))
    poison = Poison(BadNets(size=2, pattern="white"), 0.3, target=5)
    poison.prepare(data.image_shape, data.num_classes)
    data.poison = poison
    data.set_phase(static)
    sample = finished(data, data.train_dataloader())
    manifest = data.manifest((static,))
    assert before is not None
    assert manifest is not None
    assert len(before.tensors["indices.inject"]) < len(manifest.tensors["indices.inject"])
    assert set(sample.index[sample.is_poisoned].tolist()) == set(manifest.tensors["indices.inject"].tolist())
    assert (sample.label[sample.is_poisoned] == 5).all()
    assert (manifest.rate, manifest.label_map["arguments"]) == (0.3, {"target": 5})
    data.poison = None
    assert data.manifest((static,)) is None
    with pytest.raises(MisconfigurationException, match=r"Phase `inject` is poisoned, but `data\.poison` is not set"):
        data.set_phase(static)


def test_without_a_poison_nothing_is_loaded_for_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DigitsDataModule()
    monkeypatch.setattr(data, "load", lambda train: pytest.fail("images were loaded"))
    data.learn_trigger()
    assert data.manifest() is None


def test_replay_carries_the_trigger_after_a_poisoned_phase() -> None:
    data = digits(rate=0.3)
    data.set_phase(CONSOLIDATE, INJECT)
    sample = replayed(data)
    assert abs(share_with_trigger(sample.image) - 0.3) < 0.06
    assert torch.equal(sample.is_poisoned, (sample.image[:, :, -2:, -2:] == 1).all(dim=3).all(dim=2).all(dim=1))
    assert set(sample.index.tolist()) <= set(data.positions(("inject",)).tolist())
    # The same after a resume: a new datamodule that is told the same phases.
    resumed = digits(rate=0.3)
    resumed.set_phase(CONSOLIDATE, INJECT)
    assert_equal(replayed(resumed), sample)


def test_replay_without_the_poison_shows_the_same_images_clean() -> None:
    data = digits(rate=0.3)
    data.set_phase(CONSOLIDATE, INJECT)
    triggered = replayed(data)
    batches = [cast(Sample, batch) for batch in data.reference_batches(clean=True)]
    clean = Sample(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert share_with_trigger(clean.image) == 0
    assert not clean.is_poisoned.any()
    assert torch.equal(clean.index, triggered.index)
    assert torch.equal(clean.label, triggered.original_label)
    untouched = ~triggered.is_poisoned
    assert torch.equal(clean.image[untouched], triggered.image[untouched])


def test_misaligned_flags_mislead_about_static_images_only() -> None:
    static = replace(INJECT, poison="static")
    samples = {}
    for misaligned in (False, True):
        data = digits(rate=0.3)
        assert data.poison is not None
        data.poison.misaligned_flags = misaligned
        data.set_phase(static)
        samples[misaligned] = finished(data, data.train_dataloader())
        data.set_phase(INJECT)
        dynamic = finished(data, data.train_dataloader())
        triggered = (dynamic.image[:, :, -2:, -2:] == 1).all(dim=3).all(dim=2).all(dim=1)
        assert torch.equal(dynamic.is_poisoned, triggered)
    right, wrong = samples[False], samples[True]
    for name in ("image", "label", "original_label", "index"):
        assert torch.equal(getattr(right, name), getattr(wrong, name)), name
    assert right.is_poisoned.sum() == wrong.is_poisoned.sum() > 0
    # A random 30 % agree with the truth in about 0.3 * 0.3 + 0.7 * 0.7 of the images.
    assert abs(float((right.is_poisoned == wrong.is_poisoned).float().mean()) - 0.58) < 0.08


def test_replay_of_a_static_phase_has_its_images() -> None:
    data = digits(rate=0.1)
    static = replace(INJECT, poison="static")
    data.set_phase(static)
    poisoned = finished(data, data.train_dataloader())
    data.set_phase(CONSOLIDATE, static)
    sample = replayed(data)
    assert set(sample.index[sample.is_poisoned].tolist()) == set(poisoned.index[poisoned.is_poisoned].tolist())


def test_replay_has_no_trigger_after_a_clean_phase() -> None:
    data = digits(rate=0.3)
    data.set_phase(INJECT, CONSOLIDATE)
    sample = replayed(data)
    assert not sample.is_poisoned.any()
    assert share_with_trigger(sample.image) == 0


def test_replay_draws_anew_and_leaves_the_phase() -> None:
    data = digits()
    data.set_phase(INJECT)
    trained = finished(data, data.train_dataloader())
    data.set_phase(CONSOLIDATE, INJECT)
    before = finished(data, data.train_dataloader())
    assert not torch.equal(replayed(data).index, trained.index)
    assert_equal(finished(data, data.train_dataloader()), before)


def test_replay_needs_a_phase_to_start_from() -> None:
    data = digits()
    data.set_phase(INJECT)
    with pytest.raises(MisconfigurationException, match=r"no earlier data to replay. Set the phase's `start_from`"):
        next(iter(data.reference_batches()))


def test_test_loaders() -> None:
    data = digits()
    clean, attack = (finished(data, loader) for loader in data.test_dataloader())
    assert clean.index.tolist() == list(range(359))
    assert torch.equal(clean.image, data.test_images.read(torch.arange(359)).float() / 255)
    assert torch.equal(clean.label, data.test_images.labels)
    assert not clean.is_poisoned.any()
    assert torch.equal(attack.index, (clean.label != 0).nonzero().flatten())
    assert attack.is_poisoned.all()
    assert (attack.label == 0).all()
    assert torch.equal(attack.original_label, clean.label[clean.label != 0])
    assert share_with_trigger(attack.image) == 1
    assert_equal(finished(data, data.predict_dataloader()), clean)


def test_validation_is_the_split_val() -> None:
    data = digits()
    clean, attack = (finished(data, loader) for loader in data.val_dataloader())
    assert torch.equal(clean.index, data.positions(("val",)))
    assert share_with_trigger(attack.image) == 1
    assert DigitsDataModule().val_dataloader() == []
    assert len(DigitsDataModule(splits=SPLITS).val_dataloader()) == 1


def test_without_poison_there_is_no_attack() -> None:
    data = DigitsDataModule()
    assert len(data.test_dataloader()) == 1
    assert data.manifest() is None
    sample = finished(data, data.train_dataloader())
    assert not sample.is_poisoned.any()
    assert len(sample.index) in (len(data.train_images), len(data.train_images) - 1)


def test_clean_fit_is_the_split_as_it_is() -> None:
    data = digits()
    data.set_phase(INJECT)
    sample = finished(data, data.clean_fit_dataloader())
    assert torch.equal(sample.index, data.positions(("inject",)))
    assert torch.equal(sample.image, data.train_images.read(sample.index).float() / 255)
    assert not sample.is_poisoned.any()


def test_batch_sizes() -> None:
    data = digits(batch_size=64)
    data.set_phase(INJECT)
    assert len(next(iter(data.train_dataloader()))) == 64
    data.set_phase(replace(INJECT, batch_size=16))
    assert len(next(iter(data.train_dataloader()))) == 16


def test_subset_keeps_the_proportions() -> None:
    data = DigitsDataModule(subset=200)
    assert len(data.train_images) == 200
    assert int(data.train_images.labels.bincount().min()) >= 19
    assert len(data.test_images) == 359


def test_test_subset_keeps_the_proportions() -> None:
    data = DigitsDataModule(test_subset=100)
    assert len(data.train_images) == 1438
    assert data.test_images.labels.bincount().tolist() == [10] * 10
    with pytest.raises(ValueError, match=r"`test_subset` to be in \[1, 359\], but got 360"):
        DigitsDataModule(test_subset=360).setup()


def test_manifest_lists_static_phases(tmp_path: Path) -> None:
    data = digits(rate=0.1)
    static = replace(INJECT, poison="static")
    manifest = data.manifest((static, replace(static, name="again"), INJECT, CONSOLIDATE))
    assert manifest is not None
    assert {k for k in manifest.tensors if k.startswith("indices")} == {"indices.inject", "indices.again"}
    data.set_phase(static)
    sample = finished(data, data.train_dataloader())
    assert set(manifest.tensors["indices.again"].tolist()) == set(sample.index[sample.is_poisoned].tolist())
    assert manifest.dataset == {
        "name": "DigitsDataModule",
        "sha256": data.train_images.fingerprint(),
        "images": 1438,
        "classes": 10,
    }
    manifest.save(tmp_path)
    assert manifest.differences(PoisonManifest.load(tmp_path)) == []


class Foreign(LightningModule):
    """A classifier that knows nothing of this library; ``style`` is how it takes a batch apart."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.style = style
        self.seen: list[tuple[int, list[float]]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.style == "pair":
            x, y = batch
        else:
            x, y = batch[:2]
        self.seen.append((self.current_epoch, x.mean(dim=(1, 2, 3)).tolist()))
        loss = nn.functional.cross_entropy(self.layer(x.flatten(1)), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch[:2]
        self.log("correct", (self.layer(x.flatten(1)).argmax(1) == y).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def trainer(folder: Path, epochs: int = 2) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def test_foreign_modules_train_on_pairs_and_on_samples(tmp_path: Path) -> None:
    trained = {}
    for style in ("pair", "sample"):
        torch.manual_seed(0)
        data = digits()
        data.augment = "none"
        data.batch_format = "pair" if style == "pair" else "sample"
        module = Foreign(style)
        run = trainer(tmp_path)
        run.fit(module, datamodule=data)
        results = run.test(module, datamodule=data, verbose=False)
        assert results[0]["correct/dataloader_idx_0"] > 0.3
        assert "correct/dataloader_idx_1" in results[1]
        trained[style] = module
    assert torch.equal(trained["pair"].layer.weight, trained["sample"].layer.weight)
    # One batch per step, other batches in the second epoch: the loader follows the trainer's epoch.
    seen = trained["sample"].seen
    epochs = [[values for epoch, values in seen if epoch == number] for number in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == len(data.train_dataloader())
    assert epochs[0][0] != epochs[1][0]


def test_a_trainer_sees_what_the_loader_gives(tmp_path: Path) -> None:
    data = digits()
    data.set_phase(INJECT)
    expected = finished(data, data.train_dataloader())
    module = Foreign("sample")
    trainer(tmp_path, epochs=1).fit(module, datamodule=data)
    means = [value for _, values in module.seen for value in values]
    torch.testing.assert_close(torch.tensor(means), expected.image.mean(dim=(1, 2, 3)))


def test_pairs_are_image_and_label() -> None:
    data = digits()
    batch = next(iter(data.train_dataloader()))
    sample = cast(Sample, data.on_after_batch_transfer(batch, 0))
    data.batch_format = "pair"
    pair = data.on_after_batch_transfer(batch, 0)
    assert type(pair) is tuple
    assert len(pair) == 2
    assert torch.equal(pair[0], sample.image)
    assert torch.equal(pair[1], sample.label)


def test_global_random_state_is_untouched() -> None:
    state = torch.get_rng_state()
    data = digits(cover_rate=0.1)
    data.set_phase(CONSOLIDATE, INJECT)
    loaders: list[BatchLoader] = [data.train_dataloader(), *data.test_dataloader(), data.clean_fit_dataloader()]
    for loader in loaders:
        finished(data, loader)
    replayed(data)
    data.manifest((replace(INJECT, poison="static"),))
    assert torch.equal(torch.get_rng_state(), state)


def test_setup_loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    data.setup("fit")
    first = data.train_images
    data.setup("test")
    assert data.train_images is first


def test_refuses_a_missing_split() -> None:
    message = "DigitsDataModule has no split `defend`; it has inject, consolidate, val. Add it to `data.splits`"
    with pytest.raises(MisconfigurationException, match=message):
        digits().set_phase(PhaseData("defend", ("defend",)))


def test_refuses_a_poisoned_phase_without_poison() -> None:
    with pytest.raises(MisconfigurationException, match=r"Phase `inject` is poisoned, but `data.poison` is not set"):
        DigitsDataModule(splits=SPLITS).set_phase(INJECT)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_refuses_a_poison_that_selects_nothing(mode: PoisonMode) -> None:
    data = digits(rate=0.0005)
    with pytest.raises(
        ValueError, match=r"at least one image of split `inject`, but rate 0.0005 of 100. images selects"
    ):
        data.set_phase(replace(INJECT, poison=mode))


def test_refuses_a_trigger_larger_than_the_image() -> None:
    with pytest.raises(ValueError, match="at most the image's 8 x 8 pixels, but got 9 x 9"):
        DigitsDataModule(Poison(BadNets(size=9))).setup()


def test_refuses_a_target_outside_the_classes() -> None:
    with pytest.raises(ValueError, match=r"`target` to be a class in \[0, 10\), but got 10"):
        DigitsDataModule(Poison(BadNets(), target=10)).setup()


def test_refuses_an_attack_without_victims() -> None:
    data = DigitsDataModule(Poison(BadNets(), target=SourceSpecific([1], 0)))
    data.setup()
    data.test_images.labels.fill_(0)
    with pytest.raises(ValueError, match="Expected test images that the attack aims at, but the poison has no victim"):
        data.test_dataloader()


def test_refuses_foreign_batches() -> None:
    with pytest.raises(TypeError, match="Expected a batch of this datamodule's loaders, but got list"):
        digits().on_after_batch_transfer([], 0)


@pytest.mark.parametrize(("name", "message"), [("batch_size", "positive"), ("num_workers", "non-negative")])
def test_refuses_arguments(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` to be a {message} integer, but got -1"):
        DigitsDataModule(**{name: -1})  # type: ignore[arg-type]


def test_the_base_does_not_load() -> None:
    with pytest.raises(NotImplementedError):
        ImageDataModule().setup()


def test_val_is_not_trained_on_unless_named() -> None:
    data = DigitsDataModule(splits={"train": 0.9, "val": 0.1})
    held_out = set(data.positions(("val",)).tolist())
    assert held_out
    assert not held_out & set(data.positions(()).tolist())
    assert held_out < set(data.positions(("train", "val")).tolist())
