"""A selection in a config, as a user types it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from lightning_bd.batch import PoisonMode, Sample
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison
from lightning_bd.selection import KNNTypicality, RawPixels, Selection
from lightning_bd.triggers import BadNets

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("workplace")

KNN = {
    "class_path": "lightning_bd.selection.Selection",
    "init_args": {
        "scorer": {
            "class_path": "lightning_bd.selection.KNNTypicality",
            "init_args": {"k": 5, "encoder": {"class_path": "lightning_bd.selection.RawPixels"}},
        },
        "order": "hardest",
    },
}


def write_config(**poison: Any) -> None:
    config = yaml.safe_load(Path("small.yaml").read_text())
    config["data"]["init_args"]["poison"] |= {"clean_label": True, "rate": 0.2, "target": 3, **poison}
    config["trainer"]["phases"]["inject"]["max_epochs"] = 1
    Path("selected.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def expected_positions(order: str = "hardest") -> tuple[DigitsDataModule, list[int]]:
    """Choose by hand: the images of class 3 in the split, the farthest from their five nearest neighbours first."""
    data = DigitsDataModule(splits={"inject": 0.6, "consolidate": 0.2, "defend": 0.2}, subset=300)
    positions = data.positions(("inject",))
    positions = positions[data.train_images.labels[positions] == 3]
    pixels = data.train_images.read(positions).flatten(1).double()
    pixels = pixels / pixels.norm(dim=1, keepdim=True)
    cosines = (pixels @ pixels.T).fill_diagonal_(-1)
    typicality = cosines.sort(dim=1, descending=True).values[:, :5].mean(dim=1)
    count = int(0.2 * len(positions))
    assert count == 3
    ranked = positions[typicality.argsort(descending=order == "easiest")]
    return data, sorted(ranked[:count].tolist())


@pytest.mark.parametrize(("mode", "order"), [("static", "easiest"), ("dynamic", "hardest")])
def test_fit_poisons_what_was_selected(lightning_bd: Command, cache: Path, mode: str, order: str) -> None:
    selection = {**KNN, "init_args": {**KNN["init_args"], "order": order}}  # type: ignore[dict-item]
    write_config(mode=mode, selection=selection)
    outcome = lightning_bd("fit", "--config", "selected.yaml", "--trainer.default_root_dir=run")
    assert outcome.status == 0, outcome.err
    manifest = PoisonManifest.load(Path("run"))
    assert manifest.tensors["indices.inject"].tolist() == expected_positions(order)[1]
    [table] = cache.iterdir()
    assert len(table.read_text().splitlines()) == 1 + len(_of_class_3())


def test_a_scorer_by_itself_chooses_the_hardest(lightning_bd: Command) -> None:
    write_config(mode="static", selection=KNN["init_args"]["scorer"])  # type: ignore[index]
    outcome = lightning_bd("fit", "--config", "selected.yaml", "--trainer.default_root_dir=run")
    assert outcome.status == 0, outcome.err
    assert PoisonManifest.load(Path("run")).tensors["indices.inject"].tolist() == expected_positions()[1]


def _of_class_3() -> torch.Tensor:
    data, _ = expected_positions()
    positions = data.positions(("inject",))
    return positions[data.train_images.labels[positions] == 3]


@pytest.mark.parametrize("selection", [None, list(range(300))])
@pytest.mark.slow
def test_the_older_forms_parse(lightning_bd: Command, selection: list[int] | None) -> None:
    write_config(mode="static", selection=selection)
    outcome = lightning_bd("fit", "--config", "selected.yaml", "--trainer.default_root_dir=run")
    assert outcome.status == 0, outcome.err
    assert len(PoisonManifest.load(Path("run")).tensors["indices.inject"]) == 3


def test_missing_weights_are_a_readable_error(lightning_bd: Command) -> None:
    encoder = {
        "class_path": "lightning_bd.selection.TorchvisionEncoder",
        "init_args": {"name": "resnet18", "weights": "missing.pt"},
    }
    scorer = {"class_path": "lightning_bd.selection.MeanTypicality", "init_args": {"encoder": encoder}}
    write_config(selection={"class_path": "lightning_bd.selection.Selection", "init_args": {"scorer": scorer}})
    outcome = lightning_bd("fit", "--config", "selected.yaml", "--trainer.default_root_dir=run")
    outcome.check_refused(["no encoder weights", "missing.pt", "put the file there"])


def test_a_checkpoint_is_an_encoder(lightning_bd: Command, trained: Path) -> None:
    backbone = yaml.safe_load(Path("small.yaml").read_text())["model"]["backbone"]
    weights = next(trained.glob("*_inject/final.ckpt"))
    encoder = {
        "class_path": "lightning_bd.selection.CheckpointEncoder",
        "init_args": {"backbone": backbone, "weights": str(weights)},
    }
    scorer = {"class_path": "lightning_bd.selection.KNNTypicality", "init_args": {"k": 5, "encoder": encoder}}
    write_config(selection={"class_path": "lightning_bd.selection.Selection", "init_args": {"scorer": scorer}})
    outcome = lightning_bd("fit", "--config", "selected.yaml", "--trainer.default_root_dir=run")
    assert outcome.status == 0, outcome.err
    assert len(PoisonManifest.load(Path("run")).tensors["indices.inject"]) == 3


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_same_images_are_poisoned_in_every_epoch(mode: PoisonMode) -> None:
    """And no others, each time that one is seen; the pixels of the others stay."""
    _, expected = expected_positions()
    selection = Selection(KNNTypicality(RawPixels(), k=5))
    poison = Poison(BadNets(size=2, pattern="white"), 0.2, 3, mode, clean_label=True, selection=selection)
    splits = {"inject": 0.6, "consolidate": 0.2, "defend": 0.2}
    data = DigitsDataModule(poison, splits, batch_size=64, subset=300, augment="none", seed=0)
    data.set_phase(PhaseData("inject", ("inject",), mode))
    for _ in range(2):
        poisoned: list[int] = []
        for raw in data.train_dataloader():
            sample = cast(Sample, data.on_after_batch_transfer(raw, 0))
            clean = data.train_images.read(sample.index).float() / 255
            changed = (sample.image != clean).flatten(1).any(dim=1)
            assert torch.equal(changed, sample.is_poisoned)
            assert torch.equal(sample.label, sample.original_label)
            poisoned += sample.index[sample.is_poisoned].tolist()
        assert sorted(poisoned) == expected


@pytest.mark.slow
def test_a_surrogate_in_a_config(lightning_bd: Command, cache: Path) -> None:
    surrogate = {"backbone": "lightning_bd.backbones.small_cnn", "epochs": 1}
    scorer = {"class_path": "lightning_bd.selection.LossScore", "init_args": {"surrogate": surrogate}}
    write_config(selection={"class_path": "lightning_bd.selection.Selection", "init_args": {"scorer": scorer}})
    outcome = lightning_bd("fit", "--config", "selected.yaml", "--trainer.default_root_dir=run")
    assert outcome.status == 0, outcome.err
    assert len(PoisonManifest.load(Path("run")).tensors["indices.inject"]) == 3
    [table] = cache.iterdir()
    assert len(table.read_text().splitlines()) == 1 + len(_of_class_3())
