"""What every defense gets, may depend on, and leaves behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.callbacks import DefenderData, Defense, FineTuning, Report
from lightning_bd.datamodules import DefenderView, DigitsDataModule, PhaseData
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

DEFEND = PhaseData("defend-ft", ("defend",), batch_size=32)


class Module(LightningModule):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class AddOne(Defense):
    """Adds one to every bias and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.data: DefenderData | None = None

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        self.data = data
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(1)
        return Report(epochs=2, values={"added": 1.0}, note="one more")


def digits(seed: int = 0, trigger_seed: int = 0, rate: float = 0.1, target: int = 0) -> DigitsDataModule:
    poison = Poison(BadNets(size=2, seed=trigger_seed), rate, target)
    return DigitsDataModule(poison, {"inject": 0.8, "defend": 0.2}, augment="crop", seed=seed)


def fit(
    folder: Path, module: LightningModule, data: LightningDataModule, defense: Callback, epochs: int = 0,
    resume: Path | None = None,
) -> Trainer:  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[defense, ModelCheckpoint(folder, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_may_be_the_whole_defense(tmp_path: Path) -> None:
    module, defense = Module(), AddOne()
    before = weights(module)
    trainer = fit(tmp_path, module, digits().defender_view(DEFEND), defense)
    assert defense.report == Report(2, {"added": 1.0}, "one more")
    assert trainer.global_step == 0
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name] + 1 if name.endswith("bias") else before[name]), name


def test_it_comes_before_training(tmp_path: Path) -> None:
    purified, plain = Module(), Module()
    AddOne().purify(plain, DefenderData(lambda epoch: iter(()), lambda: iter(()), 10))
    fit(tmp_path / "a", purified, digits().defender_view(DEFEND), AddOne(), epochs=1)
    fit(tmp_path / "b", plain, digits().defender_view(DEFEND), Callback(), epochs=1)
    assert equal(weights(purified), weights(plain))


def test_it_gets_the_views_batches(tmp_path: Path) -> None:
    defense = AddOne()
    view = digits().defender_view(DEFEND)
    view.epoch_limit = 3
    fit(tmp_path, Module(), view, defense)
    data = defense.data
    assert data is not None
    assert (data.num_classes, data.epoch_limit, data.show_progress) == (10, 3, False)
    twin = digits().defender_view(DEFEND)
    for epoch in (0, 1):
        pairs = zip(data.train(epoch), twin.batches("train", epoch=epoch), strict=True)
        assert all(torch.equal(a, b) for given, expected in pairs for a, b in zip(given, expected, strict=True))
    pairs = zip(data.validation(), twin.batches("validation"), strict=True)
    assert all(torch.equal(a, b) for given, expected in pairs for a, b in zip(given, expected, strict=True))
    assert not torch.equal(next(data.train(0))[0], next(data.train(1))[0])


def test_no_cap_is_no_limit(tmp_path: Path) -> None:
    """Lightning writes "no limit" as -1."""
    defense = AddOne()
    view = digits().defender_view(DEFEND)
    view.epoch_limit = -1
    fit(tmp_path, Module(), view, defense)
    assert defense.data is not None
    assert defense.data.epoch_limit is None


def test_a_resume_does_not_purify_twice(tmp_path: Path) -> None:
    whole = Module()
    fit(tmp_path, whole, digits().defender_view(DEFEND), AddOne(), epochs=2)
    resumed, defense = Module(), AddOne()
    (tmp_path / "1.ckpt").unlink()
    fit(tmp_path, resumed, digits().defender_view(DEFEND), defense, epochs=2, resume=tmp_path / "0.ckpt")
    assert defense.data is None, "purify was not called"
    assert defense.report == Report(2, {"added": 1.0}, "one more")
    assert equal(weights(resumed), weights(whole))


def test_another_fit_purifies_again(tmp_path: Path) -> None:
    defense, module = AddOne(), Module()
    for number in (1, 2):
        before = weights(module)["net.1.bias"]
        fit(tmp_path / str(number), module, digits().defender_view(DEFEND), defense)
        assert torch.equal(weights(module)["net.1.bias"], before + 1)


def test_state_before_and_after() -> None:
    fresh, used = AddOne(), AddOne()
    assert fresh.state_dict() == {}
    used.report = Report(3, {"a": 1.0}, "x")
    fresh.load_state_dict(used.state_dict())
    assert fresh.report == used.report
    fresh.load_state_dict({})
    assert fresh.report is None


def replaced(data: DigitsDataModule) -> DigitsDataModule:
    """Give the datamodule another attack and another test set."""
    images, labels = data.test_images.read(torch.arange(50)), data.test_images.labels[:50]
    data._test = TensorImages(255 - images, labels.flip(0), data.test_images.class_names)
    data.replace_poison(Poison(BadNets(size=4, seed=9), 0.7, target=5, mode="static"))
    return data


def test_nothing_leaks_from_the_attack_and_the_test_set_into_a_defense(tmp_path: Path) -> None:
    """The defended weights depend on the defender's clean split and on nothing else: not one bit changes."""

    def defend(name: str, data: DigitsDataModule, before: bool = False) -> dict[str, Tensor]:
        view = data.defender_view(DEFEND)
        if not before:
            replaced(data)
        module = Module()
        defense = FineTuning(learning_rates=(0.05, 1.0, 30.0), max_epochs=2)
        fit(tmp_path / name, module, view, defense, epochs=1)
        assert defense.report is not None
        return weights(module) | {"rate": torch.tensor(defense.report.values["learning_rate"])}

    reference = defend("a", digits(), before=True)
    assert not equal(reference, weights(Module()))
    assert equal(reference, defend("replaced after the view was made", digits()))
    assert equal(reference, defend("replaced before", replaced(digits())))
    assert equal(reference, defend("another poison", digits(trigger_seed=4, rate=0.5, target=7)))
    assert equal(
        reference, defend("no poison", DigitsDataModule(None, {"inject": 0.8, "defend": 0.2}, augment="crop", seed=0))
    )
    # The comparison can fail: another order of the clean split is another model.
    assert not equal(reference, defend("control", digits(seed=1)))


class Ordinary(LightningDataModule):
    """A user's own datamodule."""

    def train_dataloader(self) -> "Batches":
        return Batches()


class Batches:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("data", [Ordinary(), digits()])
def test_it_refuses_anything_but_a_defenders_view(tmp_path: Path, data: LightningDataModule) -> None:
    module = Module()
    before = weights(module)
    with pytest.raises(
        MisconfigurationException,
        match=r"AddOne works on a DefenderView, .*: fit with `datamodule=DefenderView\(\.\.\.\)`, or call `purify",
    ):
        fit(tmp_path, module, data, AddOne())
    assert equal(before, weights(module))


def test_it_refuses_loaders_alone(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", max_epochs=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[AddOne()], default_root_dir=tmp_path,
    )  # fmt: skip
    view = digits().defender_view(DEFEND)
    with pytest.raises(MisconfigurationException, match="AddOne works on a DefenderView"):
        trainer.fit(Module(), view.train_dataloader(), view.val_dataloader())


def test_a_view_made_by_hand_is_enough(tmp_path: Path) -> None:
    data = digits()
    view = DefenderView(data.train_images.select(torch.arange(200)), batch_size=16)
    defense = AddOne()
    fit(tmp_path, Module(), view, defense)
    assert defense.report is not None


def test_it_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Defense()  # type: ignore[abstract]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    module, defense = Module(), AddOne()
    module.get_parameter("net.1.weight").data[0, 0] = float("nan")
    with pytest.raises(MisconfigurationException, match=r"weights that are not finite: `net\.1\.weight`; training has"):
        fit(tmp_path, module, digits().defender_view(DEFEND), defense)
    assert defense.report is None
