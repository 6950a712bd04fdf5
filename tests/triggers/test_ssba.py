"""SSBA: bits that are there, in each image differently, within a budget."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from lightning_bd.backbones import small_cnn
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.stealth import peak_signal_to_noise_ratio
from lightning_bd.manifest import PoisonManifest
from lightning_bd.poisoning import Poison
from lightning_bd.quiet import expected_warnings
from lightning_bd.triggers import SSBA
from lightning_bd.triggers.steganography import BitDecoder, BitEncoder, train_pair

IMAGES = torch.randint(0, 256, (20, 3, 9, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(20) % 10


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "triggers"


def small(**options: float) -> SSBA:
    return SSBA(**{"bits": 3, "width": 2, "steps": 3, "batch_size": 4, **options})  # type: ignore[arg-type]


def learned(trigger: SSBA) -> SSBA:
    trigger.learn(IMAGES, LABELS, 0)
    return trigger


def encoder_of(trigger: SSBA) -> BitEncoder:
    assert isinstance(trigger.network, BitEncoder)
    return trigger.network


def pair(seed: int = 0) -> tuple[BitEncoder, BitDecoder]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BitEncoder((3, 9, 8), 3, 2), BitDecoder((3, 9, 8), 3, 2)


def test_the_equations() -> None:
    """Adam's first steps, with the schedule and the two weights written out."""
    encoder, decoder = pair()
    twin_encoder, twin_decoder = pair()
    train_pair(IMAGES, encoder, decoder, epsilon=0.1, image_weight=0.5, steps=4, lr=0.01, batch_size=5, seed=3)
    parameters = [*twin_encoder.parameters(), *twin_decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for step, (bound, weight) in enumerate([(4.0, 0.0), (2.5, 0.0), (1.0, 0.0), (1.0, 0.25)]):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item()) / 2
        generator = keyed_generator(3, "steganography", step)
        rows = torch.randint(20, (5,), generator=generator)
        secrets = torch.randint(2, (5, 3), generator=generator).float()
        clean = IMAGES[rows] / 255
        residual = twin_encoder(clean, secrets)
        written = (clean + 0.1 * bound * residual).clamp(0, 1)
        stored = written + ((255 * written).round() / 255 - written).detach()
        loss = F.binary_cross_entropy_with_logits(twin_decoder(stored), secrets) + weight * residual.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What they do: a bias before a normalisation has no effect, so that its gradient is noise, which Adam amplifies.
    clean, secrets = IMAGES / 255, torch.tensor([[0.0, 1.0, 1.0]]).expand(20, -1)
    assert torch.allclose(encoder(clean, secrets), twin_encoder(clean, secrets), atol=1e-4)
    assert torch.allclose(decoder(clean), twin_decoder(clean), atol=1e-4)
    untrained = pair()[0]
    assert not torch.allclose(encoder(clean, secrets), untrained(clean, secrets), atol=1e-2)


@pytest.mark.parametrize("epsilon", [4 / 255, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_holds(epsilon: float, dtype: torch.dtype) -> None:
    trigger = learned(small(epsilon=epsilon))
    # Whatever the weights are.
    encoder_of(trigger).body.head.weight.mul_(1e6)
    images = (IMAGES / 255).to(dtype)
    before = images.clone()
    result = trigger(images)
    assert result.dtype == dtype
    assert result.shape == images.shape
    assert bool(((result >= 0) & (result <= 1)).all())
    assert (result.float() - images.float()).abs().max() <= epsilon + (0.01 if dtype == torch.bfloat16 else 1e-6)
    assert not torch.equal(result, images)
    assert torch.equal(images, before)


def test_the_residual_is_the_encoders_for_its_secret() -> None:
    trigger = learned(small(epsilon=0.1))
    assert (
        encoder_of(trigger).secret.tolist() == torch.randint(2, (3,), generator=keyed_generator(0, "secret")).tolist()
    )
    images = IMAGES / 255
    residual = encoder_of(trigger)(images, encoder_of(trigger).secret.repeat(20, 1))
    assert torch.allclose(trigger(images), (images + 0.1 * residual).clamp(0, 1))
    other = encoder_of(trigger)(images, 1 - encoder_of(trigger).secret.repeat(20, 1))
    assert not torch.allclose(residual, other)


def test_a_result_does_not_depend_on_the_batch() -> None:
    trigger = learned(small())
    images = IMAGES / 255
    assert torch.allclose(trigger(images)[7:8], trigger(images[7:8]), atol=1e-6)


def test_the_same_arguments_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = learned(small()).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    kept = learned(small()).state_dict()
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "other"))
    again = learned(small()).state_dict()
    other = learned(small(seed=1)).state_dict()
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], kept[name]) for name in first)
    assert not torch.equal(first["network.spread.weight"], other["network.spread.weight"])
    assert sum(tensor.numel() for tensor in first.values()) * 4 < 2**20


def test_defaults_are_small() -> None:
    trigger = SSBA()
    sizes = [torch.Size(spec.shape).numel() for spec in trigger._specs((3, 32, 32)).values()]
    assert 4 * sum(sizes) < 2**20


def test_the_manifest_holds_the_encoder_alone(tmp_path: Path) -> None:
    rule = Poison(small(), 0.1, target=0, mode="static")
    manifest = DigitsDataModule(rule, subset=100).manifest()
    assert manifest is not None
    assert manifest.trigger["arguments"] == {"epsilon": 16 / 255, "bits": 3, "width": 2, "seed": 0}
    manifest.save(tmp_path)
    twin = PoisonManifest.load(tmp_path).build_trigger()
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(twin(images), rule.trigger(images))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("width", 10**6, r"`width` to be an integer in \[1, 256\]"),
        ("bits", 10**9, r"`bits` to be an integer in \[1, 1024\]"),
        ("width", 4, "to have shape"),
        ("epsilon", 3.0, "`epsilon`"),
    ],
)
def test_a_hostile_manifest_is_refused(name: str, value: float, words: str) -> None:
    manifest = DigitsDataModule(Poison(small(), 0.1), subset=100).manifest()
    assert manifest is not None
    arguments = manifest.trigger["arguments"]
    assert isinstance(arguments, dict)
    arguments[name] = value
    with pytest.raises(ValueError, match=f"SSBA cannot be built: .*{words}"):
        manifest.build_trigger()


def test_weights_that_overflow_give_images() -> None:
    trigger = small()
    learnt = learned(small()).state_dict()
    huge = {name: torch.full_like(tensor, 1e38) for name, tensor in learnt.items() if name != "network.secret"}
    trigger.restore((3, 9, 8), huge | {"network.secret": learnt["network.secret"]})
    result = trigger(IMAGES / 255)
    assert bool(((result >= 0) & (result <= 1)).all())
    with pytest.raises(ValueError, match=r"`network.secret` to hold finite values in \[0.0, 1.0\]"):
        small().restore((3, 9, 8), {**learnt, "network.secret": torch.full((3,), 2.0)})


def test_refuses_arguments() -> None:
    for name, value, words in (
        ("epsilon", 0.0, r"a float in \(0, 1\], but got 0.0"),
        ("epsilon", 1.5, r"a float in \(0, 1\], but got 1.5"),
        ("bits", 0, r"an integer in \[1, 1024\], but got 0"),
        ("bits", 2.5, r"an integer in \[1, 1024\], but got 2.5"),
        ("width", 0, r"an integer in \[1, 256\], but got 0"),
        ("image_weight", -1.0, "a non-negative float, but got -1.0"),
        ("lr", 0.0, "a positive float, but got 0.0"),
        ("steps", 0, "a positive integer, but got 0"),
        ("batch_size", 0, "a positive integer, but got 0"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` to be {words}"):
            SSBA(**{name: value})  # type: ignore[arg-type]


def test_refuses_what_it_cannot_learn() -> None:
    with pytest.raises(ValueError, match="at least 8 pixels along each side for `SSBA`"):
        small().learn(IMAGES[:, :, :3], LABELS, 0)
    with pytest.raises(ValueError, match=r"The loss of steganography is not finite. Lower `lr` \(1e\+30\)"):
        learned(small(lr=1e30, steps=5))


@pytest.mark.slow
def test_bits_are_read_and_the_victim_obeys() -> None:
    """Digits at 32 pixels, 8 bits: nearly all are read from images that were not trained on."""
    torch.manual_seed(0)
    shape = (1, 32, 32)
    encoder, decoder = BitEncoder(shape, 8, 8), BitDecoder(shape, 8, 8)
    with torch.no_grad():
        encoder.secret.copy_(torch.tensor([0.0, 1.0] * 4))
    clean_data = DigitsDataModule(image_size=32)
    images, held_out = (
        part.read(torch.arange(len(part))) for part in (clean_data.train_images, clean_data.test_images)
    )
    train_pair(images, encoder, decoder, epsilon=16 / 255, image_weight=0.1, steps=250, lr=2e-3, batch_size=32, seed=0)
    clean = held_out / 255
    secrets = torch.randint(2, (len(clean), 8)).float()
    with torch.no_grad():
        stored = ((clean + 16 / 255 * encoder(clean, secrets)).clamp(0, 1) * 255).round() / 255
        assert ((decoder(stored) > 0) == (secrets > 0.5)).float().mean() > 0.95
        assert ((decoder(clean) > 0) == (secrets > 0.5)).float().mean() < 0.6
    trigger = SSBA(bits=8, width=8)
    trigger.restore(shape, {f"network.{name}": tensor for name, tensor in encoder.state_dict().items()})
    triggered = trigger(clean)
    residual = (triggered - clean).flatten(1)
    assert peak_signal_to_noise_ratio(clean, triggered).mean() > 28
    # Sample-specific: two images share most of what is added, but not all.
    directions = F.normalize(residual)
    alike = (directions @ directions.T)[~torch.eye(len(residual), dtype=torch.bool)]
    assert alike.mean() < 0.95
    data = DigitsDataModule(Poison(trigger, 0.1, target=0, mode="static"), image_size=32, batch_size=64, seed=0)
    torch.manual_seed(0)
    model = BackdoorClassifier(
        small_cnn(10, 1, width=16),
        10,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30),
    )
    trainer = Trainer(
        max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with expected_warnings():
        trainer.fit(model, datamodule=data)
        metrics = trainer.test(model, datamodule=data, verbose=False)[0]
    assert metrics["test/attack_success_rate"] > 0.9, metrics
    assert metrics["test/clean_accuracy"] > 0.9, metrics
