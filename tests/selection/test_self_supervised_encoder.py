"""The encoder that is trained without labels against a loop written out, what it learns, and what it keeps."""

import builtins
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.backbones import resnet18, small_cnn
from lightning_bd.functional.augmented_view import augmented_view
from lightning_bd.functional.draws import keyed_generator, keyed_seed
from lightning_bd.selection import Encoder, KNNTypicality, MeanTypicality, Selection, SelfSupervisedEncoder

pytest.importorskip("lightly")

SIDE = 4
IMAGES = torch.randint(0, 256, (11, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def shallow(num_classes: int, in_channels: int, hidden: int = 6) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE * in_channels, hidden), nn.Linear(hidden, num_classes))


def recipe(images: Path | None = None, epochs: int = 3, seed: int = 0, **others: Any) -> SelfSupervisedEncoder:
    return SelfSupervisedEncoder(shallow, None, images, epochs, batch_size=4, seed=seed, **others)


@pytest.fixture
def kept(cache: Path) -> Path:
    """Return the folder of the weights of one test."""
    return cache.parent / "encoders"


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Loss by the paper's equation (1), pair by pair."""
    every = torch.cat([first, second])
    count = len(first)

    def likeness(one: int, other: int) -> Tensor:
        cosine = every[one] @ every[other] / (every[one].norm() * every[other].norm())
        return torch.exp(cosine / temperature)

    losses = []
    for one in range(2 * count):
        partner = (one + count) % (2 * count)
        others = torch.stack([likeness(one, other) for other in range(2 * count) if other != one]).sum()
        losses.append(-(likeness(one, partner) / others).log())
    return torch.stack(losses).mean()


def by_hand(images: Tensor, epochs: int, seed: int, temperature: float) -> Tensor:
    """Train as the encoder does, with the loss above, and return the features of the images as they are given."""
    from lightly.models.modules.heads import SimCLRProjectionHead

    # Sorted by what only depends on the pixels; a generator of the same key draws the rest.
    from lightning_bd.selection.digests import image_digests

    digests = image_digests(images)
    pool = images[sorted(range(len(images)), key=lambda row: digests[row])].float() / 255
    mean, std = pool.mean(), pool.std(correction=0)
    torch.manual_seed(keyed_seed(seed, "self-supervised weights"))
    backbone = shallow(2, 1)[:2]  # type: ignore[index]
    torch.manual_seed(keyed_seed(seed, "self-supervised training"))
    model = nn.Sequential(backbone, SimCLRProjectionHead(6, 6, 128)).train()
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for epoch in range(epochs):
        generator = keyed_generator(seed, "self-supervised epoch", epoch)
        order = torch.randperm(len(pool), generator=generator)
        lr = 0.06 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for rows in (order[:4], order[4:8], order[8:]):
            views = torch.cat([augmented_view(pool[rows], generator), augmented_view(pool[rows], generator)])
            first, second = model((views - mean) / std).chunk(2)
            loss = nt_xent(first, second, temperature)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient, speed in zip(model.parameters(), gradients, velocity, strict=True):
                    speed.mul_(0.9).add_(gradient + 5e-4 * parameter)
                    parameter.sub_(lr * speed)
    with torch.no_grad():
        features: Tensor = backbone((images.float() / 255 - mean) / std)
    return features


@pytest.mark.parametrize(("epochs", "seed", "temperature"), [(1, 0, 0.5), (5, 3, 0.2)])
def test_trains_as_written_out(epochs: int, seed: int, temperature: float) -> None:
    with torch.random.fork_rng():
        expected = by_hand(IMAGES, epochs, seed, temperature)
    found = recipe(epochs=epochs, seed=seed, temperature=temperature).features(IMAGES)
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_order_of_the_images_and_equal_ones_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe().features(IMAGES)
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "elsewhere"))
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    assert torch.equal(recipe().features(IMAGES[order])[order.argsort()], found)
    assert torch.equal(recipe().features(torch.cat([IMAGES, IMAGES[:2]]))[:11], found)
    assert torch.equal(recipe().features(IMAGES.float() / 255), found)


def test_everything_that_matters_matters() -> None:
    found = recipe().features(IMAGES)
    for other in (recipe(epochs=2), recipe(seed=1), recipe(temperature=0.4), recipe(lr=0.05)):
        assert not torch.equal(other.features(IMAGES), found)
    fewer = recipe().features(IMAGES[:9])
    assert not torch.equal(fewer, found[:9])
    wider = SelfSupervisedEncoder(shallow, {"hidden": 7}, epochs=1, batch_size=4).features(IMAGES)
    assert wider.shape == (11, 7)


def test_training_leaves_the_random_streams_alone() -> None:
    def noisy(num_classes: int, in_channels: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(), *shallow(num_classes, in_channels).children())

    state = torch.get_rng_state()
    found = SelfSupervisedEncoder(noisy, epochs=2).features(IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    encoder = SelfSupervisedEncoder(noisy, epochs=2, batch_size=255)
    assert torch.equal(encoder.features(IMAGES), found)
    with torch.inference_mode():
        assert torch.equal(SelfSupervisedEncoder(noisy, epochs=2, batch_size=254).features(IMAGES), found)


def test_views_of_one_image_become_alike() -> None:
    """Views that were not trained on are closer to their partner than to a view of another image: half, by chance."""
    pixels = torch.tensor(load_digits().images[:300] * 255 / 16).round().to(torch.uint8)[:, None]
    views = [augmented_view(pixels.float() / 255, torch.Generator().manual_seed(seed), 0.3) for seed in (1, 2)]

    def closer(epochs: int, lr: float) -> float:
        encoder = SelfSupervisedEncoder(small_cnn, {"width": 16}, epochs=epochs, lr=lr)
        encoder.features(pixels)
        first, second = (F.normalize(encoder(view), dim=1) for view in views)
        cosines = first @ second.T
        return float((cosines.diag()[:, None] > cosines).float().mean())

    untrained, trained = closer(1, 1e-9), closer(30, 0.06)
    assert trained > 0.72
    assert trained > untrained + 0.1


def test_weights_are_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = recipe()
    found = encoder.features(IMAGES)
    [file] = kept.iterdir()

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(SelfSupervisedEncoder, "_epoch", refuse)
    assert torch.equal(recipe().features(IMAGES), found)
    file.unlink()
    # Still in memory.
    assert torch.equal(encoder.features(IMAGES.flip(0)), found.flip(0))
    with pytest.raises(AssertionError, match="trained again"):
        recipe().features(IMAGES)
    assert not list(kept.iterdir())


def test_two_scorers_share_the_weights(kept: Path) -> None:
    labels = torch.zeros(11, dtype=torch.int64)
    for scorer in (KNNTypicality(recipe(), k=3), MeanTypicality(recipe())):
        chosen = Selection(scorer).choose(IMAGES, labels, 2, 0)
        assert len(chosen) == 2
    assert len(list(kept.iterdir())) == 1


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def of_another_network(file: Path) -> None:
    other = file.parent / "other"
    SelfSupervisedEncoder(shallow, {"hidden": 2}, epochs=1).features(IMAGES)
    [made] = [path for path in file.parent.iterdir() if path != file]
    made.rename(other)
    other.replace(file)


@pytest.mark.parametrize("spoil", [cut, of_another_network])
def test_a_broken_file_is_made_anew(kept: Path, spoil: Callable[[Path], None]) -> None:
    found = recipe().features(IMAGES)
    [file] = kept.iterdir()
    content = file.read_bytes()
    spoil(file)
    with pytest.warns(UserWarning, match="The encoder in .* is broken and made anew"):
        assert torch.equal(recipe().features(IMAGES), found)
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_costs_time_only(cache: Path) -> None:
    cache.parent.write_text("a file")
    with pytest.warns(UserWarning, match=r"could not be kept .* LIGHTNING_BD_CACHE"):
        assert recipe().features(IMAGES).shape == (11, 6)


def save(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    return folder


def test_other_images_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were among the images; where they lie and what they are called does not matter."""
    expected = recipe().features(IMAGES)[:8]
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "second"))
    # One is there twice: in the folder too.
    folder = save(IMAGES[7:], tmp_path / "own" / "deep").parent
    (folder / "notes.txt").write_text("no image")
    save(255 - IMAGES[:1], folder / ".hidden")
    encoder = recipe(folder)
    assert torch.equal(encoder.features(IMAGES[:8]), expected)
    copy = save(IMAGES[7:].flip(0), tmp_path / "copy")
    assert recipe(copy).identity() == encoder.identity()
    assert "own" not in str(encoder.identity())
    (copy / "0.png").unlink()
    assert recipe(copy).identity() != encoder.identity()
    assert recipe().identity() != encoder.identity()
    assert not torch.equal(recipe(copy).features(IMAGES[:8]), expected)


def test_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing of unlabelled images. Nothing is downloaded"):
        recipe(tmp_path / "missing").features(IMAGES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`images` to be a folder of images \(.jpg.*empty holds none"):
        recipe(tmp_path / "empty").features(IMAGES)
    with pytest.raises(ValueError, match="1 or 3 channels beside a folder of others, but got 2"):
        recipe(save(IMAGES, tmp_path / "own")).features(IMAGES.expand(-1, 2, -1, -1))
    (tmp_path / "own" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"Cannot read the image .*0.png"):
        recipe(tmp_path / "own").features(IMAGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "`epochs` to be an integer of at least 1, but got 0"),
        ({"batch_size": 3}, "`batch_size` to be an integer of at least 4, but got 3"),
        ({"lr": 0.0}, "`lr` to be a positive float, but got 0.0"),
        ({"lr": math.nan}, "`lr` to be a positive float, but got nan"),
        ({"temperature": math.inf}, "`temperature` to be a positive float, but got inf"),
        ({"precision": "16"}, r"`precision` to be one of \('float32', 'bfloat16'\), but got 16"),
    ],
)
def test_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfSupervisedEncoder(**arguments)


def test_refuses_what_cannot_be_trained(kept: Path) -> None:
    with pytest.raises(ValueError, match="has not been trained: call its `features`"):
        recipe()(IMAGES.float())
    with pytest.raises(ValueError, match="at least 2 different images to train an encoder on, but got 1"):
        recipe().features(IMAGES[[0, 0, 0]])
    with pytest.raises(ValueError, match=r"not finite after epoch \d. Lower its `lr` \(1e\+30\)"):
        recipe(lr=1e30).features(IMAGES)
    assert not kept.exists()


def headless(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Flatten()


class Confusing(nn.Module):
    """Registers its head before another linear layer."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, num_classes)
        self.body = nn.Linear(SIDE * SIDE * in_channels, 6)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images.flatten(1)))
        return logits


def test_refuses_a_network_without_a_last_linear_layer() -> None:
    with pytest.raises(ValueError, match="The output of `Flatten` is not that of a linear layer"):
        SelfSupervisedEncoder(headless).features(IMAGES)


def test_the_head_is_found_by_what_it_does() -> None:
    encoder = SelfSupervisedEncoder(Confusing, epochs=1)
    assert torch.equal(encoder.features(IMAGES), encoder(IMAGES.float() / 255))
    assert encoder.features(IMAGES).shape == (11, 6)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **others: Any) -> object:
        if name.partition(".")[0] == "lightly":
            raise ModuleNotFoundError("No module named 'lightly'")
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MisconfigurationException, match=r"pip install lightning-bd\[ssl\].*No module named 'lightly'"):
        recipe().features(IMAGES)


def test_bfloat16_is_nearly_the_same() -> None:
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, int | float | str | bool] = {"width": 4}
    exact = SelfSupervisedEncoder(small_cnn, arguments, epochs=2).features(images)
    rounded = SelfSupervisedEncoder(small_cnn, arguments, epochs=2, precision="bfloat16").features(images)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, rtol=0.1, atol=0.05)


def test_in_a_config() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Encoder, "encoder")
    config = {
        "class_path": "lightning_bd.selection.SelfSupervisedEncoder",
        "init_args": {
            "backbone": "lightning_bd.backbones.resnet18",
            "backbone_arguments": {"width": 4},
            "epochs": 1,
        },
    }
    encoder = parser.instantiate(parser.parse_object({"encoder": config})).encoder
    assert isinstance(encoder, SelfSupervisedEncoder)
    assert encoder.backbone is resnet18
    assert encoder.features(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))).shape == (4, 32)
