"""The loss beside other data against a loop written out, and what the other data must be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from lightning_bd.functional.draws import keyed_generator, keyed_seed
from lightning_bd.selection import OODLoss, Selection, Surrogate

SIDE = 6
NAMES = ("a", "b", "c")
#: Images per class of the other data.
SIZES = (9, 7, 8)


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE * in_channels, num_classes))


def recipe(epochs: int = 5, seed: int = 0) -> Surrogate:
    return Surrogate(linear, epochs=epochs, lr=0.05, batch_size=10, seed=seed)


def pixels(seed: int, count: int, channels: int = 3, side: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def save(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)


def others(channels: int = 3, side: int = SIDE) -> list[Tensor]:
    return [pixels(10 + label, count, channels, side) for label, count in enumerate(SIZES)]


def write(folder: Path, classes: list[Tensor]) -> Path:
    for name, images in zip(NAMES, classes, strict=True):
        for number, image in enumerate(images):
            save(image, folder / name / f"{number}.png")
    return folder


@pytest.fixture
def ood(tmp_path: Path) -> Path:
    """Return a folder of three classes, and files that are none of its images."""
    folder = write(tmp_path / "ood", others())
    (folder / "readme.txt").write_text("no class")
    (folder / "a" / "labels.csv").write_text("no image")
    (folder / "a" / ".hidden.png").write_text("no image")
    save(pixels(1, 1)[0], folder / ".thumbnails" / "0.png")
    return folder


OWN = pixels(0, 20)
#: Any number: it is no place among the surrogate's classes.
LABELS = torch.full((20,), 7)


def by_hand(images: Tensor, labels: Tensor, epochs: int = 5) -> Tensor:
    """Train the linear model with the equations of SGD; return the losses of all images."""
    inputs = images.float() / 255
    mean, std = (f(inputs.double(), dim=(0, 2, 3), keepdim=True).float() for f in (torch.mean, _population_std))
    inputs = (inputs - mean) / std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(0, "surrogate"))
        model = linear(int(labels.max()) + 1, images.shape[1])
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(epochs):
        lr = 0.05 * (1 + np.cos(np.pi * epoch / epochs)) / 2
        order = torch.randperm(len(labels), generator=keyed_generator(0, "surrogate order", epoch))
        for rows in torch.split(order, 10):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            grads = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, grads, strict=True):
                    v.mul_(0.9).add_(g + 5e-4 * p)
                    p.sub_(lr * v)
    losses: Tensor = -model(inputs).log_softmax(1)[torch.arange(len(labels)), labels].detach()
    return losses


def _population_std(inputs: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return inputs.std(dim=dim, correction=0, keepdim=keepdim)


def test_losses_are_those_of_the_loop(ood: Path) -> None:
    labels = torch.tensor([0] * 9 + [1] * 7 + [2] * 8 + [3] * 20)
    expected = by_hand(torch.cat([*others(), OWN]), labels)[24:]
    scores = OODLoss(ood, recipe()).score(OWN, LABELS, 7)
    assert scores.dtype == torch.float64
    assert torch.allclose(scores.float(), expected, atol=1e-4, rtol=1e-3)
    assert torch.allclose(OODLoss(str(ood), recipe()).score(OWN.float() / 255, LABELS, 7), scores, atol=1e-5)


def test_each_of_the_attackers_classes_is_one_more(ood: Path) -> None:
    own = torch.tensor([8, 2] * 10)
    labels = torch.tensor([0] * 9 + [1] * 7 + [2] * 8 + [4, 3] * 10)
    expected = by_hand(torch.cat([*others(), OWN]), labels)[24:]
    scores = OODLoss(ood, recipe()).score(OWN, own, None)
    assert torch.allclose(scores.float(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_other_data_get_the_size_and_the_channels_of_the_attackers(tmp_path: Path, channels: int) -> None:
    """Height and width of their own, and three channels for one or one for three."""
    raw = others(4 - channels, 9)
    folder = write(tmp_path / "ood", raw)
    fitted = []
    for images in raw:
        made = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in images]
        arrays = [
            np.array(image.convert("L" if channels == 1 else "RGB").resize((4, 9), Image.Resampling.BILINEAR))
            for image in made
        ]
        fitted.append(torch.from_numpy(np.stack(arrays)).view(len(arrays), 9, 4, channels).permute(0, 3, 1, 2))
    own = pixels(0, 20, channels, 9)[..., :4].contiguous()
    assert own.shape[2] * own.shape[3] == SIDE * SIDE
    labels = torch.tensor([0] * 9 + [1] * 7 + [2] * 8 + [3] * 20)
    expected = by_hand(torch.cat([*fitted, own]), labels)[24:]
    scores = OODLoss(folder, recipe()).score(own, LABELS, 7)
    assert torch.allclose(scores.float(), expected, atol=1e-4, rtol=1e-3)


def test_an_image_like_the_other_data_is_the_hardest(tmp_path: Path) -> None:
    """Dark and middle grey are other classes, the attacker's is light, but for one image."""
    shades = torch.tensor([20, 120]).view(2, 1, 1, 1, 1)
    noise = pixels(3, 20, 1).remainder(20)
    for name, images in zip(NAMES, noise + shades, strict=False):
        for number, image in enumerate(images.to(torch.uint8)):
            save(image, tmp_path / "ood" / name / f"{number}.png")
    own = noise + 230
    own[13] -= 110
    surrogate = Surrogate(linear, epochs=20, lr=0.05, batch_size=10)
    choose = Selection(OODLoss(tmp_path / "ood", surrogate)).choose
    assert choose(own, LABELS, 1, 7).tolist() == [13]


def test_training_is_repeatable_and_leaves_no_trace(ood: Path) -> None:
    state = torch.get_rng_state()
    first = OODLoss(ood, recipe()).score(OWN, LABELS, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second = OODLoss(ood, recipe()).score(OWN, LABELS, 7)
    torch.set_rng_state(state)
    assert torch.equal(first, second)
    assert not torch.equal(first, OODLoss(ood, recipe(seed=1)).score(OWN, LABELS, 7))


def test_the_order_of_the_data_set_does_not_matter(ood: Path, tmp_path: Path) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    tables: list[tuple[list[int], str]] = []
    for rows in (torch.arange(20), order):
        selection = Selection(OODLoss(ood, recipe()), cache_dir=tmp_path / str(len(tables)))
        chosen = selection.choose(OWN[rows], LABELS, 6, 7, indices=rows)
        assert selection.table is not None
        tables.append((sorted(rows[chosen].tolist()), selection.table.read_text()))
    assert tables[0] == tables[1]


def test_the_attacker_needs_no_other_class() -> None:
    assert not OODLoss("anywhere").needs_other_classes


def test_at_most_so_many_images_are_drawn(ood: Path, tmp_path: Path) -> None:
    """The same as a folder that holds nothing else; a class with fewer images gives all."""
    used: list[int] = []

    class Spy(Surrogate):
        def train(
            self,
            images: Tensor,
            labels: Tensor,
            note: Callable[[Tensor, Tensor], None] | None = None,
            perturb: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
        ) -> nn.Module:
            used[:] = labels.bincount().tolist()
            seen.append(images)
            return super().train(images, labels, note, perturb)

    seen: list[Tensor] = []
    OODLoss(ood, Spy(linear, epochs=1), max_images=8).score(OWN, LABELS, 7)
    assert used == [8, 7, 8, 20]
    OODLoss(ood, Spy(linear, epochs=1), max_images=3).score(OWN, LABELS, 7)
    assert used == [3, 3, 3, 20]
    OODLoss(ood, Spy(linear, epochs=1, seed=1), max_images=3).score(OWN, LABELS, 7)
    assert not torch.equal(seen[1], seen[2])
    first = torch.cat([images[:3] for images in others()])
    assert not torch.equal(seen[1][:9], first)
    for number, image in enumerate(seen[1][:9]):
        assert (others()[number // 3] == image).flatten(1).all(dim=1).any()
        save(image, tmp_path / "part" / NAMES[number // 3] / f"{number}.png")
    scores = OODLoss(ood, recipe(), max_images=3).score(OWN, LABELS, 7)
    assert torch.equal(OODLoss(tmp_path / "part", recipe()).score(OWN, LABELS, 7), scores)


def test_a_table_is_of_one_content_wherever_it_lies(ood: Path, cache: Path) -> None:
    """A file more, less, renamed or with other pixels makes another table; what is no image does not."""

    def tables(folder: Path, max_images: int | None = None) -> int:
        Selection(OODLoss(folder, recipe(1), max_images)).choose(OWN, LABELS, 3, 7)
        return len(list(cache.iterdir()))

    assert tables(ood) == tables(ood) == 1
    assert tables(write(ood.parent / "elsewhere", others())) == 1
    (ood / "b" / "notes.txt").write_text("no image")
    assert tables(ood) == 1
    save(pixels(5, 1)[0], ood / "b" / "9.png")
    assert tables(ood) == 2
    # The last of b becomes the first of c.
    (ood / "b" / "9.png").rename(ood / "c" / "!.png")
    assert tables(ood) == 3
    save(pixels(6, 1)[0], ood / "c" / "!.png")
    assert tables(ood) == 4
    (ood / "c" / "!.png").unlink()
    assert tables(ood) == 4
    assert tables(ood, 2) == 5
    Selection(OODLoss(ood, recipe(2))).choose(OWN, LABELS, 3, 7)
    assert len(list(cache.iterdir())) == 6


def test_what_was_scored_needs_no_surrogate_again(ood: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Selection(OODLoss(ood, recipe(1))).choose(OWN, LABELS, 3, 7).tolist()
    monkeypatch.delattr(Surrogate, "train")
    assert Selection(OODLoss(ood, recipe(1))).choose(OWN, LABELS, 3, 7).tolist() == expected


def test_refuses_arguments() -> None:
    with pytest.raises(ValueError, match="`max_images` to be a positive integer or None, but got 0"):
        OODLoss("anywhere", max_images=0)


def test_refuses_folders_that_cannot_be_used(tmp_path: Path) -> None:
    scorer = OODLoss(tmp_path / "ood", recipe(1))
    select = Selection(scorer).choose
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*ood of out-of-distribution images.* put one"):
        select(OWN, LABELS, 3, 7)
    save(OWN[0], tmp_path / "ood" / "a" / "0.png")
    with pytest.raises(ValueError, match=r"`ood` to be a folder with a sub-folder per class, at least 2, .* has 1\."):
        select(OWN, LABELS, 3, 7)
    (tmp_path / "ood" / "b").mkdir()
    (tmp_path / "ood" / "b" / "0.txt").write_text("")
    with pytest.raises(ValueError, match=r"sub-folder of argument `ood` to hold images \(.jpg, .*, but .*b holds none"):
        scorer.score(OWN, LABELS, 7)
    (tmp_path / "ood" / "b" / "0.PNG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Cannot read the image .*0\.PNG: .* Remove or replace the file"):
        select(OWN, LABELS, 3, 7)


def test_refuses_images_that_are_neither_grey_nor_rgb(ood: Path) -> None:
    with pytest.raises(ValueError, match="images of 1 or 3 channels for `OODLoss`, but got 2"):
        OODLoss(ood, recipe(1)).score(OWN[:, :2], LABELS, 7)


@pytest.mark.usefixtures("workplace")
def test_in_a_config(lightning_bd: Callable[..., Any], cache: Path) -> None:
    config = yaml.safe_load(Path("small.yaml").read_text())
    surrogate = {"backbone": "lightning_bd.backbones.small_cnn", "epochs": 1}
    scorer = {
        "class_path": "lightning_bd.selection.OODLoss",
        "init_args": {"ood": "signs", "max_images": 5, "surrogate": surrogate},
    }
    selection = {"class_path": "lightning_bd.selection.Selection", "init_args": {"scorer": scorer}}
    config["data"]["init_args"]["poison"] |= {"clean_label": True, "rate": 0.2, "target": 3, "selection": selection}
    config["trainer"]["phases"] = {"inject": {**config["trainer"]["phases"]["inject"], "max_epochs": 1}}
    Path("selected.yaml").write_text(yaml.safe_dump(config))
    command = ("fit", "--config", "selected.yaml", "--trainer.default_root_dir=run")
    lightning_bd(*command).check_refused(["There is no folder", "signs", "`ood`"])
    write(Path("signs"), others())
    outcome = lightning_bd(*command)
    assert outcome.status == 0, outcome.err
    [table] = cache.iterdir()
    assert table.name.startswith("OODLoss-")
    assert {line.split(",")[1] for line in table.read_text().splitlines()[1:]} == {"3"}
