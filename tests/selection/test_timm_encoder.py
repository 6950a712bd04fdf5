"""Features of timm's networks against timm itself, and what is refused."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.selection import Encoder, KNNTypicality, Selection, TimmEncoder

timm = pytest.importorskip("timm")

IMAGES = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SMALL = "test_resnet.r160_in1k"
TRANSFORMER = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """Return networks that no one has trained, with classifiers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: dict[str, nn.Module] = {name: timm.create_model(name) for name in (SMALL, TRANSFORMER)}
    # Statistics as after training.
    for network in made.values():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean += 0.1
                layer.running_var *= 2
    return made


def write(network: nn.Module, path: Path, with_head: bool = True) -> Path:
    head = network.pretrained_cfg["classifier"]  # type: ignore[index]
    saved = {key: value for key, value in network.state_dict().items() if with_head or not key.startswith(f"{head}.")}
    assert with_head or len(saved) == len(network.state_dict()) - 2
    if path.suffix == ".safetensors":
        save_file(saved, path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in saved.items()}}, path)
    return path


def by_hand(network: nn.Module, images: Tensor, size: int) -> Tensor:
    """Features by timm's own functions."""
    settings = timm.data.resolve_model_data_config(network)
    if images.shape[-1] != size:
        images = F.interpolate(images, size=size, mode=settings["interpolation"], antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(settings[part]).view(3, 1, 1) for part in ("mean", "std"))
    with torch.no_grad():
        model: Any = network.eval()
        features: Tensor = model.forward_head(model.forward_features((images - mean) / std), pre_logits=True)
    return features


@pytest.mark.parametrize("name", [SMALL, TRANSFORMER])
@pytest.mark.parametrize(("file", "with_head"), [("w.safetensors", True), ("w.pth", False)])
def test_features_are_timms(
    networks: dict[str, nn.Module], tmp_path: Path, name: str, file: str, with_head: bool
) -> None:
    network = networks[name]
    path = write(network, tmp_path / file, with_head)
    state = torch.get_rng_state()
    found = TimmEncoder(name, path).features(IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shape == (3, network.num_features)
    assert torch.allclose(found, by_hand(network, IMAGES.float() / 255, 160), atol=1e-4)


def test_normalisation_is_the_tags(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    """What timm says, not always ImageNet's statistics."""
    with torch.random.fork_rng():
        network = timm.create_model("vit_tiny_patch16_224.augreg_in21k", depth=1)
    assert network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    encoder = TimmEncoder("vit_tiny_patch16_224.augreg_in21k", tmp_path / "w.pth")
    encoder._network = network
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _network, inputs: seen.append(inputs[0]))
    network.train()
    encoder(torch.ones(1, 1, 224, 224))
    assert network.training
    assert torch.equal(seen[0], torch.ones(1, 3, 224, 224))


def test_grey_images_have_three_equal_channels(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    encoder = TimmEncoder(SMALL, write(networks[SMALL], tmp_path / "w.pth"), image_size=32, batch_size=2)
    assert torch.equal(encoder.features(IMAGES[:, :1]), encoder.features(IMAGES[:, :1].expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("name", [SMALL, TRANSFORMER])
def test_image_size(networks: dict[str, nn.Module], tmp_path: Path, name: str) -> None:
    """A transformer's positions are resampled by timm."""
    found = TimmEncoder(name, write(networks[name], tmp_path / "w.safetensors"), image_size=64).features(IMAGES)
    with torch.random.fork_rng():
        network = timm.create_model(name)
    network.load_state_dict(networks[name].state_dict())
    if name == TRANSFORMER:
        network.set_input_size(img_size=64)
    assert torch.allclose(found, by_hand(network, IMAGES.float() / 255, 64), atol=1e-4)


def test_a_network_of_one_size(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        network = timm.create_model("mixer_s32_224")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    message = "`image_size` to be 224 or None, since mixer_s32_224 takes images of that size only, but got 64"
    with pytest.raises(ValueError, match=message):
        TimmEncoder("mixer_s32_224", tmp_path / "w.pth", image_size=64).features(IMAGES)


@pytest.mark.parametrize("name", ["resnet19", "resnet50.nowhere", "", ".a1_in1k"])
def test_refuses_a_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"`name` to be a network of timm such as 'resnet50' or .*, but got"):
        TimmEncoder(name, "w.pth")


def test_refuses_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`image_size` to be a positive integer or None, but got 0"):
        TimmEncoder(SMALL, "w.pth", image_size=0)
    with pytest.raises(ValueError, match="`batch_size` to be a positive integer, but got 0"):
        TimmEncoder(SMALL, "w.pth", batch_size=0)
    with pytest.raises(ValueError, match="1 or 3 channels, but got 2"):
        TimmEncoder(SMALL, "w.pth")(torch.zeros(1, 2, 8, 8))


def test_refuses_weights(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=rf"{missing}. Nothing is downloaded: put the file there, or set"):
        TimmEncoder(SMALL, missing).features(IMAGES)
    with pytest.raises(FileNotFoundError, match="put the file there"):
        Selection(KNNTypicality(TimmEncoder(SMALL, missing), k=1)).choose(
            IMAGES, torch.zeros(3, dtype=torch.int64), 1, 0
        )
    path = write(networks[TRANSFORMER], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="are of another network: Missing"):
        TimmEncoder(SMALL, path).features(IMAGES)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"Cannot read the encoder weights .*: the file is broken"):
        TimmEncoder(TRANSFORMER, path).features(IMAGES)


def test_identity_is_the_content_not_the_place(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    first = TimmEncoder(SMALL, write(networks[SMALL], tmp_path / "one.pth"))
    (tmp_path / "two.pth").write_bytes((tmp_path / "one.pth").read_bytes())
    assert TimmEncoder(SMALL, tmp_path / "two.pth", batch_size=3).identity() == first.identity()
    assert TimmEncoder(SMALL, tmp_path / "two.pth", image_size=64).identity() != first.identity()


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **others: Any) -> object:
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MisconfigurationException, match=r"pip install lightning-bd\[timm\].*No module named 'timm'"):
        TimmEncoder(SMALL, "w.pth")


def test_in_a_config(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Encoder, "encoder")
    path = str(write(networks[SMALL], tmp_path / "w.safetensors"))
    config = {"class_path": "lightning_bd.selection.TimmEncoder", "init_args": {"name": SMALL, "weights": path}}
    encoder = parser.instantiate(parser.parse_object({"encoder": config})).encoder
    assert isinstance(encoder, TimmEncoder)
    assert encoder.features(IMAGES).shape[0] == 3
