"""What a defender can reach."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_bd.datamodules import DefenderView, DigitsDataModule, ImageDataModule, PhaseData
from lightning_bd.datamodules.images import FileImages, TensorImages
from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets, Trigger

# Lightning 2.6 on torch 2.15.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

DEFEND = PhaseData("defend", ("defend",), batch_size=16)


def poisoned_digits(mode: str = "static") -> DigitsDataModule:
    poison = Poison(BadNets(size=2, pattern="white"), 0.5, mode="static" if mode == "static" else "dynamic")
    return DigitsDataModule(poison, {"inject": 0.8, "defend": 0.2}, augment="crop_flip", seed=0)


def everything(view: DefenderView) -> list[Tensor]:
    return [
        tensor
        for part in ("train", "validation")
        for epoch in (0, 1)
        for pair in view.batches(part, epoch=epoch)
        for tensor in pair
    ]


def reachable(value: object, depth: int) -> Iterator[tuple[str, object]]:
    """Yield attributes, public properties and container elements, so many levels down."""
    named = dict(vars(value)) if hasattr(value, "__dict__") else {}
    for name in dir(type(value)):
        if not name.startswith("_") and isinstance(getattr(type(value), name), property):
            named[name] = getattr(value, name)
    if isinstance(value, dict):
        named |= {str(key): item for key, item in value.items()}
    for name, item in named.items():
        yield name, item
        if depth > 1:
            yield from ((f"{name}.{inner}", found) for inner, found in reachable(item, depth - 1))


def test_it_sees_the_clean_split_and_nothing_else() -> None:
    data = poisoned_digits()
    data.augment = "none"
    view = data.defender_view(DEFEND)
    positions = data.positions(("defend",))
    images = torch.cat([image for part in ("train", "validation") for image, _ in view.batches(part)])
    expected = data.train_images.read(positions).float() / 255
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(expected.flatten(1).sum(1).tolist())
    assert view.num_classes == 10


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_no_attribute_leads_to_the_attack(mode: str) -> None:
    data = poisoned_digits(mode)
    data.manifest((PhaseData("inject", ("inject",), "static"),))
    view = data.defender_view(DEFEND)
    forbidden = (Poison, PoisonManifest, Trigger, ImageDataModule)
    test_set, whole = data.test_images, data.train_images
    assert isinstance(test_set, TensorImages)
    assert isinstance(whole, TensorImages)
    tensors = [test_set.images, test_set.labels, whole.images, whole.labels, *data._training_splits.cut.values()]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    found = list(reachable(view, depth=3))
    assert len(found) > 10
    for name, value in found:
        assert not isinstance(value, forbidden), name
        assert not any(word in name for word in ("poison", "manifest", "test", "index")), name
        if isinstance(value, Tensor):
            assert value.untyped_storage().data_ptr() not in pointers, name
            assert len(value) < len(test_set), name
    for name in ("poison", "manifest", "test_images", "train_images", "positions", "fingerprint"):
        assert not hasattr(view, name)


def test_loaders_carry_no_poison() -> None:
    view = poisoned_digits().defender_view(DEFEND)
    for loader in (view.train_dataloader(), view.val_dataloader()):
        assert loader.poison is None
        assert loader.static_rows is None
        assert all(batch.context.poison is None and batch.poison_rows is None for batch in loader)


def test_its_batches_do_not_depend_on_poison_and_test_set() -> None:
    expected = everything(poisoned_digits().defender_view(DEFEND))
    data = poisoned_digits()
    view = data.defender_view(DEFEND)
    data.poison = Poison(BadNets(), 0.9, target=5)
    assert isinstance(data.test_images, TensorImages)
    data.test_images.images.fill_(255)
    data.test_images.labels.fill_(3)
    assert isinstance(data.train_images, TensorImages)
    data.train_images.images.fill_(255)
    data.train_images.labels.fill_(3)
    for after in (everything(view), everything(poisoned_digits("dynamic").defender_view(DEFEND))):
        assert len(after) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(after, expected, strict=True))


def test_parts_are_disjoint_and_stratified() -> None:
    view = poisoned_digits().defender_view(DEFEND, validation=0.25)
    train, validation = view._parts["train"], view._parts["validation"]
    assert not set(train.tolist()) & set(validation.tolist())
    assert len(train) + len(validation) == len(view._images)
    counts = view._images.labels[validation].bincount()
    assert int(counts.max() - counts.min()) <= 1


def test_training_is_shuffled_and_augmented_and_validation_is_not() -> None:
    view = poisoned_digits().defender_view(DEFEND)
    first, second = (list(view.batches("train", epoch=epoch)) for epoch in (0, 1))
    assert not torch.equal(first[0][0], second[0][0])
    for one, other in zip(view.batches("validation", epoch=0), view.batches("validation", epoch=1), strict=True):
        assert torch.equal(one[0], other[0])
    positions = view._parts["validation"]
    assert torch.equal(
        torch.cat([image for image, _ in view.batches("validation")]), view._images.read(positions) / 255
    )


def test_files_hold_the_split_alone(file_images: FileImages) -> None:
    part = file_images.select(torch.arange(0, 20))
    view = DefenderView(part, batch_size=4, validation=0.4)
    assert isinstance(view._images, FileImages)
    assert len(view._images.paths) == 20
    assert len(list(view.batches("validation"))) == 2


class Foreign(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.steps += 1
        return nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self.layer(x.flatten(1)), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_defense_trains_on_pairs(tmp_path: Path) -> None:
    view = poisoned_digits().defender_view(DEFEND)
    module = Foreign()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=view)
    assert module.steps == 2 * len(view.train_dataloader())
    assert "loss" in trainer.callback_metrics


def test_refuses_a_poisoned_defense() -> None:
    phase = PhaseData("defend", ("defend",), "dynamic")
    with pytest.raises(MisconfigurationException, match="Phase `defend` defends, so it cannot be `poisoned`"):
        poisoned_digits().defender_view(phase)


@pytest.mark.parametrize("validation", [0.0, 1.0, -0.1])
def test_refuses_validation(validation: float) -> None:
    with pytest.raises(ValueError, match=r"`validation` to be a share in \(0, 1\), but got"):
        poisoned_digits().defender_view(DEFEND, validation=validation)


def test_refuses_too_few_images() -> None:
    images = TensorImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), "ab")
    with pytest.raises(ValueError, match=r"split `validation` .* gets no image of class 0, which has 2"):
        DefenderView(images, batch_size=2)


def test_refuses_foreign_batches() -> None:
    with pytest.raises(TypeError, match="Expected a batch of this datamodule's loaders, but got list"):
        poisoned_digits().defender_view(DEFEND).on_after_batch_transfer([], 0)
