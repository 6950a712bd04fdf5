"""Encoders: features by hand, weights from disk, and what is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from lightning_bd.backbones import preact_resnet18, resnet18, small_cnn, vgg11_bn
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.selection import CheckpointEncoder, Encoder, KNNTypicality, RawPixels, Selection, TorchvisionEncoder
from lightning_bd.selection.network_encoder import penultimate

IMAGES = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def network() -> nn.Module:
    return small_cnn(num_classes=10, in_channels=1, width=4)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Return the weights of a small network, as a file."""
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def by_hand(path: Path, images: Tensor) -> Tensor:
    model = network()
    saved = torch.load(path, weights_only=True)
    saved = {k.removeprefix("backbone."): v for k, v in saved.get("state_dict", saved).items() if "metric" not in k}
    model.load_state_dict(saved)
    features: Tensor = model.get_submodule("features").eval()(images).amax(dim=(2, 3)).detach()
    return features


def test_raw_pixels() -> None:
    features = RawPixels().features(IMAGES)
    assert torch.equal(features, IMAGES.flatten(1).float() / 255)
    assert torch.equal(RawPixels().features(IMAGES.double() / 255), features)


def test_features_are_made_in_batches() -> None:
    class Small(RawPixels):
        batch_size = 4
        seen: list[int] = []  # noqa: RUF012

        def __call__(self, images: Tensor) -> Tensor:
            self.seen.append(len(images))
            return super().__call__(images)

    assert torch.equal(Small().features(IMAGES), RawPixels().features(IMAGES))
    assert Small.seen == [4, 2]


def test_refuses_features_of_another_shape() -> None:
    class Wrong(Encoder):
        def __call__(self, images: Tensor) -> Tensor:
            return images

    with pytest.raises(ValueError, match=r"`Wrong` to give features \(6, D\), but got \(6, 1, 8, 8\)"):
        Wrong().features(IMAGES)


def test_checkpoint_encoder_reads_plain_weights(weights: Path) -> None:
    encoder = CheckpointEncoder(network(), weights)
    assert torch.equal(encoder.features(IMAGES), by_hand(weights, IMAGES.float() / 255))
    normalized = CheckpointEncoder(network(), weights, mean=[0.3], std=[0.5], batch_size=6)
    assert torch.equal(normalized.features(IMAGES), by_hand(weights, (IMAGES.float() / 255 - 0.3) / 0.5))


def test_checkpoint_encoder_reads_ours(tmp_path: Path) -> None:
    module = BackdoorClassifier(network(), num_classes=10)
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "final.ckpt")
    found = CheckpointEncoder(network(), tmp_path / "final.ckpt").features(IMAGES)
    assert torch.equal(found, by_hand(tmp_path / "final.ckpt", IMAGES.float() / 255))


def test_encoding_leaves_no_trace(weights: Path) -> None:
    encoder = CheckpointEncoder(network(), weights)
    state = torch.get_rng_state()
    encoder.backbone.train()
    encoder.features(IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for layer in encoder.backbone.modules())
    assert not any(layer._forward_hooks for layer in encoder.backbone.modules())
    saved = torch.load(weights, weights_only=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in encoder.backbone.state_dict().items())


@pytest.mark.parametrize("build", [resnet18, preact_resnet18, vgg11_bn])
def test_penultimate_features_make_the_logits(build: Callable[..., nn.Module]) -> None:
    model = build(num_classes=3, width=4).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    assert torch.equal(head(penultimate(model, images)), model(images))


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(dim=1)])
def test_refuses_a_network_without_a_head(last: nn.Module) -> None:
    first = nn.Linear(64, 3) if isinstance(last, nn.Softmax) else nn.Identity()
    with pytest.raises(ValueError, match="The output of `Sequential` is not that of a linear layer"):
        penultimate(nn.Sequential(nn.Flatten(), first, last), IMAGES.float())


@pytest.mark.parametrize("with_head", [True, False])
def test_torchvision_encoder(tmp_path: Path, with_head: bool) -> None:
    """Also of weights without a head, and with a head for other classes."""
    model = models.resnet18(num_classes=7)
    saved = {k: v for k, v in model.state_dict().items() if with_head or not k.startswith("fc.")}
    torch.save(saved, tmp_path / "resnet18.pt")
    state = torch.get_rng_state()
    encoder = TorchvisionEncoder("resnet18", tmp_path / "resnet18.pt", image_size=32, batch_size=6)
    found = encoder.features(IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shape == (6, 512)
    model.fc = nn.Identity()
    images = nn.functional.interpolate(IMAGES.float() / 255, size=32, mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = model.eval()((images.repeat(1, 3, 1, 1) - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert torch.allclose(found, expected, atol=1e-5)


def test_torchvision_encoder_refuses_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`name` to be a classifier of torchvision.models .*, but got 'resnet19'"):
        TorchvisionEncoder("resnet19", tmp_path / "w.pt")
    with pytest.raises(ValueError, match="`image_size` to be a positive integer, but got 0"):
        TorchvisionEncoder("resnet18", tmp_path / "w.pt", image_size=0)
    with pytest.raises(ValueError, match="`batch_size` to be a positive integer, but got 0"):
        TorchvisionEncoder("resnet18", tmp_path / "w.pt", batch_size=0)
    with pytest.raises(ValueError, match="1 or 3 channels, but got 2"):
        TorchvisionEncoder("resnet18", tmp_path / "w.pt")(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize(("mean", "std"), [([0.5], None), (None, [0.5]), ([0.5], [0.5, 0.5]), ([0.5], [0.0])])
def test_checkpoint_encoder_refuses_statistics(mean: list[float] | None, std: list[float] | None) -> None:
    with pytest.raises(ValueError, match="`mean` and `std` to be both given, equally long and `std` positive"):
        CheckpointEncoder(network(), "w.pt", mean, std)


def test_missing_weights_say_where_to_put_them(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "weights.pt"
    for encoder in (CheckpointEncoder(network(), path), TorchvisionEncoder("resnet18", path)):
        with pytest.raises(FileNotFoundError, match=rf"{path}. Nothing is downloaded: put the file there, or set"):
            encoder.features(IMAGES)
        with pytest.raises(FileNotFoundError, match="put the file there"):
            Selection(KNNTypicality(encoder, k=1)).choose(IMAGES, torch.zeros(6, dtype=torch.int64), 1, 0)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(ValueError, match=r"Refused to load .* Nothing was executed"):
            CheckpointEncoder(network(), tmp_path / name).features(IMAGES)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_cut_is_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"Cannot read the encoder weights .*: the file is broken"):
        CheckpointEncoder(network(), weights).features(IMAGES)


@pytest.mark.parametrize("content", [torch.zeros(2), {}, {"state_dict": {"a": 1}}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="are no `state_dict`"):
        CheckpointEncoder(network(), tmp_path / "w.pt").features(IMAGES)


def test_weights_of_another_network_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are of another network: .*size mismatch|are of another network: Missing"):
        CheckpointEncoder(small_cnn(10, 1, width=8), weights).features(IMAGES)
    torch.save(models.resnet18(num_classes=2).state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match="are of another network: Missing"):
        TorchvisionEncoder("resnet34", tmp_path / "resnet.pt", image_size=32).features(IMAGES)


def test_identity_is_the_content_not_the_place(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(weights.read_bytes())
    first, second = (CheckpointEncoder(network(), path, batch_size=n) for path, n in ((weights, 5), (copy, 6)))
    assert first.identity() == second.identity()
    assert KNNTypicality(first, k=3).identity() == KNNTypicality(second, k=3).identity()
    torch.save(network().state_dict(), copy)
    assert first.identity() != second.identity()
    assert first.identity() != CheckpointEncoder(network(), weights, [0.5], [0.5]).identity()
