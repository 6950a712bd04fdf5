"""``lightning-bd poison`` and ``preview``, as a user types them."""

import csv
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from lightning_bd.commands import CommandTrainer
from lightning_bd.commands.poisoned_copy import PoisonFailedError
from lightning_bd.commands.preview import draw_preview
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule, ImageFolderDataModule, PhaseData
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.functional.stealth import largest_change, peak_signal_to_noise_ratio, structural_similarity
from lightning_bd.manifest import PoisonManifest
from lightning_bd.phase import Phase
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets, Blended, LIRATrigger, TrainTestTrigger

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("workplace")

SPLITS = {"inject": 0.6, "consolidate": 0.2, "defend": 0.2}


MODEL = LightningModule()


class OddData(ImageDataModule):
    """Images that are not square."""

    def load(self, train: bool) -> TensorImages:
        return TensorImages(torch.zeros(20, 3, 8, 6, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"))


def quiet_trainer(**phases: Phase) -> CommandTrainer:
    """A Trainer of the command line, called without it."""
    return CommandTrainer(phases=phases, accelerator="cpu", logger=False, enable_progress_bar=False)


def digits(poison: Poison | None = None) -> DigitsDataModule:
    """The data of ``small.yaml``."""
    poison = poison or Poison(BadNets(2, pattern="white"), rate=0.1, mode="static")
    return DigitsDataModule(poison, splits=SPLITS, batch_size=64, subset=300, seed=1)


def config(path: Path, *changes: tuple[str, str]) -> Path:
    """Write a changed ``small.yaml`` of the poisoned phase alone."""
    text = Path("small.yaml").read_text()
    text = text[: text.index("    consolidate:")]
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)
    return path


def batches(data: ImageDataModule, phase: PhaseData) -> list[tuple[Tensor, ...]]:
    """The batches of an epoch."""
    data.set_phase(phase)
    return [tuple(data.on_after_batch_transfer(raw, 0)) for raw in data.train_dataloader()]


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


@pytest.mark.parametrize(
    "poison",
    [
        "{trigger: {class_path: lightning_bd.triggers.BadNets, init_args: {size: 2}}, rate: 0.1, target: 3}",
        "{trigger: {class_path: lightning_bd.triggers.WaNet}, rate: 0.2, cover_rate: 0.3, seed: 4, mode: static}",
    ],
    ids=["dynamic", "covers"],
)
@pytest.mark.slow
def test_fit_on_the_folder_equals_fit_in_memory(lightning_bd: Command, tmp_path: Path, poison: str) -> None:
    text = Path("small.yaml").read_text()
    start = text.index("    poison:\n")
    old = text[start : text.index("trainer:\n")]
    given = (old, f"    poison: {poison}\n    augment: crop_flip\n")
    memory = config(tmp_path / "memory.yaml", given, ("poisoned: true", "poisoned: static"))
    disk = config(
        tmp_path / "disk.yaml",
        given,
        ("DigitsDataModule", "ImageFolderDataModule"),
        ("    splits: {inject: 0.6, consolidate: 0.2, defend: 0.2}\n", f"    root: {tmp_path / 'copy'}\n"),
        ("    subset: 300\n", ""),
        ("      split: inject\n", ""),
        ("poisoned: true", "poisoned: false"),
    )
    assert lightning_bd("poison", "--config", memory, "--output", tmp_path / "copy").status == 0
    found = []
    for name, path in (("memory", memory), ("disk", disk)):
        run = lightning_bd("fit", "--config", path, "--trainer.default_root_dir", tmp_path / name)
        assert run.status == 0, run.err
        checkpoint = torch.load(tmp_path / name / "00_inject" / "final.ckpt", weights_only=True)
        with (tmp_path / name / "results.csv").open() as file:
            (row,) = csv.DictReader(file)
        found.append((checkpoint["state_dict"], row))
    (weights, row), (others, other_row) = found
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    for column in ("clean_accuracy", "attack_success_rate"):
        assert row[column] == other_row[column]


def test_batches_are_equal_bit_for_bit(lightning_bd: Command, tmp_path: Path) -> None:
    path = config(tmp_path / "static.yaml", ("poisoned: true", "poisoned: static"))
    outcome = lightning_bd("poison", "--config", path, "--output", tmp_path / "copy")
    assert outcome.status == 0, outcome.err
    memory, disk = digits(), ImageFolderDataModule(tmp_path / "copy", batch_size=64, seed=1, augment="crop")
    assert disk.image_shape == (1, 8, 8)
    memory.augment = "crop"
    positions = memory.positions(("inject",))
    expected = batches(memory, PhaseData("inject", ("inject",), "static"))
    got = batches(disk, PhaseData("inject"))
    assert len(got) == len(expected) == 3
    assert sum(int(batch[2].sum()) for batch in expected) == 18
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert torch.equal(positions[mine[4]], theirs[4])
    assert torch.equal(disk.test_images.read(torch.arange(50)), memory.test_images.read(torch.arange(50)))
    assert torch.equal(disk.test_images.labels, memory.test_images.labels)
    assert "180 training images, 18 of them poisoned, and" in outcome.out


def test_pixels_labels_and_manifest(lightning_bd: Command, tmp_path: Path) -> None:
    outcome = lightning_bd("poison", "--config", "small.yaml", "--output", tmp_path / "copy", "--phase", "inject")
    assert outcome.status == 0, outcome.err
    data, manifest = digits(), PoisonManifest.load(tmp_path / "copy")
    assert manifest.mode == "static"
    assert manifest.dataset["sha256"] == data.fingerprint()
    order, chosen = manifest.tensors["order.train"], set(manifest.tensors["indices.inject"].tolist())
    assert torch.equal(order, data.positions(("inject",)))
    assert len(chosen) == 18
    written = {int(path.stem): path for path in (tmp_path / "copy" / "train").rglob("*.png")}
    assert written.keys() == set(order.tolist())
    clean = data.train_images
    for position, path in written.items():
        before = clean.read(torch.tensor([position]))[0, 0]
        expected = before.clone()
        if position in chosen:
            expected[-2:, -2:] = 255
            assert path.parent.name == "0"
        else:
            assert path.parent.name == str(clean.labels[position].item())
        assert torch.equal(pixels(path), expected)
    assert not (tmp_path / "copy" / "INCOMPLETE").exists()


def test_without_phases_it_is_the_whole_training_set(lightning_bd: Command, tmp_path: Path) -> None:
    args = ("poison", "--config", "small.yaml", "--output", "copy", "--trainer.phases", "null", "--data.exclude", "[7]")
    assert lightning_bd(*args).status == 0
    written = {int(path.stem) for path in (tmp_path / "copy" / "train").rglob("*.png")}
    assert written == set(range(300)) - {7}


def test_a_folder_that_is_not_empty_is_refused(lightning_bd: Command, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    outcome = lightning_bd("poison", "--config", "small.yaml", "--output", tmp_path / "full")
    outcome.check_refused([f"{tmp_path / 'full'} is not empty", "Give another folder"])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(MisconfigurationException, match=r"mine.txt is not a folder"):
        quiet_trainer().poison(MODEL, digits(), tmp_path / "full" / "mine.txt")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_what_was_cut_is_marked(
    lightning_bd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    saved, save = [], Image.Image.save

    def fill_up(self: Image.Image, path: Path) -> None:
        saved.append(path)
        if len(saved) > 50:
            raise failure
        save(self, path)

    monkeypatch.setattr(Image.Image, "save", fill_up)
    if isinstance(failure, OSError):
        outcome = lightning_bd("poison", "--config", "small.yaml", "--output", "copy")
        assert outcome.status == 1
        assert "No space left on device" in outcome.err
        assert "marked so by the file INCOMPLETE" in outcome.err
        assert "Traceback" not in outcome.err
    else:
        with pytest.raises(KeyboardInterrupt):
            quiet_trainer().poison(MODEL, digits(), tmp_path / "copy")
    monkeypatch.setattr(Image.Image, "save", save)
    assert (tmp_path / "copy" / "INCOMPLETE").exists()
    assert not (tmp_path / "copy" / "images.json").exists()
    with pytest.raises(MisconfigurationException, match="it was not written to its end"):
        ImageFolderDataModule(tmp_path / "copy").setup()
    with pytest.raises(MisconfigurationException, match="cut, and is incomplete"):
        quiet_trainer().poison(MODEL, digits(), tmp_path / "copy")


# Below the size of an image, and of the list of images that is written last.
@pytest.mark.parametrize("limit", [100, 1000])
def test_no_room_in_the_file_system(tmp_path: Path, limit: int) -> None:
    data = digits()
    data.setup()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(PoisonFailedError, match=r"not be written to .*/copy: File too large. What is there is not"):
            quiet_trainer().poison(MODEL, data, tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "copy" / "INCOMPLETE").exists()
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert (len(list((tmp_path / "copy" / "test").rglob("*.png"))) > 0) == (limit == 1000)


def test_a_folder_that_cannot_be_made(lightning_bd: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = lightning_bd("poison", "--config", "small.yaml", "--output", tmp_path / "file" / "copy")
    assert outcome.status == 1
    assert "Not a directory. Give another `--output`." in outcome.err


def test_bad_input_of_poison(lightning_bd: Command, tmp_path: Path) -> None:
    outcome = lightning_bd("poison", "--config", "small.yaml", "--output", "copy", "--phase", "consolidate")
    outcome.check_refused(["`--phase consolidate` names no poisoned phase; those are: inject"])
    lightning_bd("poison", "--config", "small.yaml").check_refused(["output"])

    def refuse(match: str, data: ImageDataModule, phase: str | None = None, fresh: bool = False, **phases: Any) -> None:
        trainer = quiet_trainer(**phases)
        trainer.fresh = fresh
        with pytest.raises((MisconfigurationException, ValueError), match=match):
            trainer.poison(MODEL, data, tmp_path / "copy", phase)
        assert not (tmp_path / "copy").exists()

    one, two = Phase(split="inject", poisoned=True), Phase(split="consolidate", poisoned=True)
    refuse("no `data.init_args.poison`", DigitsDataModule(), one=one)
    refuse("`--fresh` is for `fit` and `defend`", digits(), fresh=True, one=one)
    refuse("rate 0.0001 of 180 images selects none", digits(Poison(BadNets(2), 0.0001)), one=one)
    refuse("Several phases are poisoned: one, two. Choose one by `--phase NAME`", digits(), one=one, two=two)
    refuse("`--phase x` names no poisoned phase; those are: one", digits(), "x", one=one)
    refuse("`--phase x` names no poisoned phase; the config has none", digits(), "x")
    refuse(r"holds square images .* but these are \(3, 8, 6\)", OddData(Poison(BadNets())))


def test_classes_may_end_without_training_images(tmp_path: Path) -> None:
    quiet_trainer().poison(MODEL, digits(Poison(BadNets(2), rate=1.0, target=3)), tmp_path / "copy")
    data = ImageFolderDataModule(tmp_path / "copy")
    assert data.num_classes == 10
    assert set(data.train_images.labels.tolist()) == {3}
    assert set(data.test_images.labels.tolist()) == set(range(10))


def test_preview(lightning_bd: Command, tmp_path: Path) -> None:
    outcome = lightning_bd("preview", "--config", "small.yaml", "--images", "3", "--output", "a/figure.png")
    assert outcome.status == 0, outcome.err
    with Image.open(tmp_path / "a" / "figure.png") as image:
        assert image.width > 300
    data = digits(Poison(BadNets(2, pattern="white")))
    clean = data.test_images.read(torch.arange(len(data.test_images)))[data.test_images.labels != 0] / 255
    triggered = clean.clone()
    triggered[..., -2:, -2:] = 1
    expected = (
        peak_signal_to_noise_ratio(clean, triggered).mean(),
        structural_similarity(clean, triggered).mean(),
        largest_change(clean, triggered).mean(),
    )
    assert len(clean) <= 500
    row = next(line for line in outcome.out.splitlines() if "BadNets" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["BadNets", str(len(clean)), "0", f"{expected[0]:.2f}", f"{expected[1]:.4f}", f"{expected[2]:.4f}"]


def test_preview_of_a_checkpoint_shows_its_trigger(lightning_bd: Command, trained: Path) -> None:
    """Of another config than the run's, and of the run's, which is found; the table beside the figure says the same."""
    (checkpoint,) = trained.glob("*_inject/final.ckpt")
    run = lightning_bd("preview", "--ckpt_path", checkpoint, "--output", "run.png", "--images=1")
    assert run.status == 0, run.err
    plain = lightning_bd("preview", "--config", "small.yaml", "--output", "config.png", "--images=1")
    assert plain.status == 0, plain.err
    alone = lightning_bd(
        "preview", "--config", "small.yaml", "--ckpt_path", checkpoint, "--data.poison=null", "--output=alone.png",
    )  # fmt: skip
    assert alone.status == 0, alone.err
    texts = [Path(f"{name}.csv").read_text() for name in ("run", "config", "alone")]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("trigger,images,unchanged,psnr,ssim,largest_change\nBadNets,")
    refused = lightning_bd("preview", "--config", "small.yaml", "--ckpt_path", trained / "init.ckpt")
    refused.check_refused(["no manifest", "init.ckpt"])


def test_preview_shows_the_test_trigger(tmp_path: Path) -> None:
    trigger = TrainTestTrigger(Blended(ratio=0.01), BadNets(2, pattern="white"))
    name, measured = draw_preview(digits(Poison(trigger)), tmp_path / "figure.png", 2, 20)
    _, alone = draw_preview(digits(Poison(BadNets(2, pattern="white"))), tmp_path / "figure.png", 2, 20)
    assert name == "TrainTestTrigger (its test trigger)"
    assert measured == alone
    assert measured.images == 20


def test_preview_rounds_what_is_stored(tmp_path: Path) -> None:
    static, dynamic = (
        draw_preview(digits(Poison(Blended(ratio=0.001), mode=mode)), tmp_path / "figure.png", 2, 20)[1]
        for mode in ("static", "dynamic")
    )
    assert static.unchanged == 20
    assert static.psnr == float("inf")
    assert static.largest_change == 0
    assert dynamic.unchanged == 0


def test_images_that_stay_as_they_are_have_no_finite_psnr(tmp_path: Path) -> None:
    # The corner of many digits is black already.
    data = digits(Poison(BadNets(2, pattern="black")))
    clean = data.test_images.read(torch.arange(len(data.test_images)))[data.test_images.labels != 0] / 255
    triggered = clean.clone()
    triggered[..., -2:, -2:] = 0
    changed = (clean != triggered).flatten(1).any(dim=1)
    _, measured = draw_preview(data, tmp_path / "figure.png", 2, 500)
    assert 0 < measured.unchanged == int((~changed).sum()) < measured.images
    expected = peak_signal_to_noise_ratio(clean[changed], triggered[changed]).mean()
    assert measured.psnr == pytest.approx(float(expected))


def test_the_arguments_of_preview(lightning_bd: Command) -> None:
    lightning_bd("preview", "--config", "small.yaml", "--images", "0").check_refused(["`images` to be a positive"])
    with pytest.raises(ValueError, match="`max_images` to be a positive integer, but got 0"):
        quiet_trainer().preview(MODEL, digits(), max_images=0)
    with pytest.raises(MisconfigurationException, match=r"no `data.init_args.poison`"):
        quiet_trainer().preview(MODEL, DigitsDataModule())
    quiet_trainer().preview(MODEL, digits(), images=1, max_images=1)
    assert Path("preview.png").is_file()


def test_a_trained_trigger_is_used_as_it_was_trained(lightning_bd: Command, tmp_path: Path) -> None:
    """And by no command before it is: what nobody trained is no attack."""
    options = ("--config", "badnets_digits", "--config", "attack/lira", "--data.subset=100", "--data.test_subset=50")
    for command in (("poison", "--output", "early"), ("preview",)):
        lightning_bd(*command, *options).check_refused(["LIRATrigger is trained together with a model", "--ckpt_path"])
    assert not Path("early").exists()
    run = tmp_path / "runs" / "badnets_digits-lira"
    fitted = lightning_bd("fit", *options, "--trainer.max_epochs=1", "--model.backbone.init_args.width=2")
    assert fitted.status == 0, fitted.err
    (checkpoint,) = run.glob("*/final.ckpt")
    written = lightning_bd("poison", "--ckpt_path", checkpoint, "--output", "poisoned")
    assert written.status == 0, written.err
    trained, found = (PoisonManifest.load(folder).tensors for folder in (run, Path("poisoned")))
    names = [name for name in trained if name.startswith("trigger.")]
    assert names
    assert all(torch.equal(trained[name], found[name]) for name in names)
    fresh = LIRATrigger(**PoisonManifest.load(run).trigger["arguments"])  # type: ignore[arg-type]
    fresh.build((1, 32, 32))
    assert any(not torch.equal(trained[f"trigger.{name}"], tensor) for name, tensor in fresh.state_dict().items())
