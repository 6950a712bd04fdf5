"""Narcissus against its equations, and against a victim."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.backbones import small_cnn
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.poisoning import Poison
from lightning_bd.quiet import expected_warnings
from lightning_bd.selection import Surrogate
from lightning_bd.selection.digests import image_digests
from lightning_bd.triggers import Narcissus

SIDE = 6
IMAGES = torch.randint(0, 256, (30, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(30) % 3
TARGET = 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_BD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "triggers"


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE * in_channels, num_classes))


def recipe(epochs: int = 5, seed: int = 0) -> Surrogate:
    return Surrogate(linear, epochs=epochs, lr=0.05, batch_size=10, seed=seed)


def others() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (8, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8) for _ in "ab"]


@pytest.fixture
def ood(tmp_path: Path) -> Path:
    for name, images in zip("ab", others(), strict=True):
        (tmp_path / "ood" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "ood" / name / f"{number}.png")
    return tmp_path / "ood"


def learned(trigger: Narcissus, images: Tensor = IMAGES, labels: Tensor = LABELS) -> Tensor:
    trigger.learn(images, labels, TARGET)
    return trigger.perturbation


def test_the_equations(ood: Path) -> None:
    """Adam written out, on the surrogate that tells both other classes from the target class."""
    trigger = Narcissus(0.05, 3.0, recipe(), ood, steps=7, lr=0.02, batch_size=4)
    found = learned(trigger)
    rows = sorted((LABELS == TARGET).nonzero().flatten().tolist(), key=image_digests(IMAGES).__getitem__)
    own = IMAGES[rows]
    network = recipe().train(torch.cat([*others(), own]), torch.tensor([0] * 8 + [1] * 8 + [2] * 10))
    delta, first, second = (torch.zeros(3, SIDE, SIDE) for _ in range(3))
    for step in range(7):
        # Ten images, four per step: an epoch has three steps.
        order = torch.randperm(10, generator=keyed_generator(0, "perturbation", step // 3))
        batch = own[order[step % 3 * 4 : step % 3 * 4 + 4]].float() / 255
        moved = delta.clone().requires_grad_()
        loss = -network((batch + moved).clamp(0, 1)).log_softmax(1)[:, 2].mean()
        [gradient] = torch.autograd.grad(loss, moved)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        ahead, wide = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        delta = (delta - 0.02 * ahead / (wide.sqrt() + 1e-8)).clamp(-0.05, 0.05)
    assert torch.allclose(found, delta, atol=1e-4)
    assert found.abs().max() > 0.04


def test_only_the_target_class_is_needed(ood: Path, cache: Path) -> None:
    everything = learned(Narcissus(0.05, 3.0, recipe(), ood, steps=5))
    mine = LABELS == TARGET
    alone = learned(Narcissus(0.05, 3.0, recipe(), ood, steps=5), IMAGES[mine], LABELS[mine])
    assert len(list(cache.iterdir())) == 2
    assert torch.equal(everything, alone)
    assert not Narcissus.needs_other_classes


@pytest.mark.parametrize("epsilon", [16 / 255, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budgets_of_training_and_attack(ood: Path, epsilon: float, dtype: torch.dtype) -> None:
    trigger = Narcissus(epsilon, 3.0, recipe(), ood, steps=20, lr=0.5)
    learned(trigger)
    assert trigger.perturbation.abs().max() == torch.tensor(epsilon)
    images = (IMAGES / 255).to(dtype)
    before = images.clone()
    trained, attacked = trigger(images), trigger.attack(images)
    for result, strength in ((trained, 1.0), (attacked, 3.0)):
        assert result.dtype == dtype
        assert bool(((result >= 0) & (result <= 1)).all())
        wanted = (IMAGES / 255 + strength * trigger.perturbation).clamp(0, 1)
        assert torch.allclose(result.float(), wanted, atol=0.02 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(images, before)


def test_the_loss_falls(ood: Path) -> None:
    trigger = Narcissus(0.1, 1.0, recipe(), ood, steps=40, lr=0.01)
    learned(trigger)
    own = IMAGES[LABELS == TARGET]
    network = recipe().train(torch.cat([*others(), own]), torch.tensor([0] * 8 + [1] * 8 + [2] * 10))
    clean = own / 255
    losses = [F.cross_entropy(network(x), torch.full((10,), 2)) for x in (clean, trigger(clean))]
    assert losses[1] < 0.9 * losses[0]


def test_other_data_count_by_their_content(ood: Path, cache: Path, tmp_path: Path) -> None:
    first = learned(Narcissus(0.05, 3.0, recipe(), ood, steps=2))
    moved = ood.rename(tmp_path / "elsewhere")
    second = learned(Narcissus(0.05, 3.0, recipe(), moved, steps=2))
    # How strongly it is used does not matter.
    third = learned(Narcissus(0.05, 1.0, recipe(), moved, steps=2))
    assert len(list(cache.iterdir())) == 1
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    learned(Narcissus(0.05, 3.0, recipe(seed=1), moved, steps=2))
    learned(Narcissus(0.06, 3.0, recipe(), moved, steps=2))
    learned(Narcissus(0.05, 3.0, recipe(), moved, max_images=3, steps=2))
    Image.new("RGB", (SIDE, SIDE)).save(moved / "a" / "0.png")
    learned(Narcissus(0.05, 3.0, recipe(), moved, steps=2))
    assert len(list(cache.iterdir())) == 5


def test_the_manifest_needs_no_other_data(ood: Path) -> None:
    rule = Poison(
        Narcissus(0.1, 2.0, Surrogate(small_cnn, epochs=1, batch_size=50), ood, steps=2), 0.5, 3, clean_label=True
    )
    data = DigitsDataModule(rule, subset=200)
    manifest = data.manifest()
    assert manifest is not None
    assert manifest.trigger == {"class": "Narcissus", "arguments": {"epsilon": 0.1, "amplification": 2.0}}
    twin = manifest.build_trigger()
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(twin.attack(images), rule.trigger.attack(images))
    manifest.tensors["trigger.perturbation"].fill_(0.2)
    with pytest.raises(ValueError, match=r"Narcissus cannot be built.*finite values in"):
        manifest.build_trigger()


def test_refuses_arguments() -> None:
    for name, value, words in (
        ("epsilon", 0.0, r"a float in \(0, 1\], but got 0.0"),
        ("epsilon", 1.5, r"a float in \(0, 1\], but got 1.5"),
        ("amplification", -1.0, "a non-negative float, but got -1.0"),
        ("amplification", float("inf"), "a non-negative float, but got inf"),
        ("lr", 0.0, "a positive float, but got 0.0"),
        ("steps", 0, "a positive integer, but got 0"),
        ("batch_size", 0, "a positive integer, but got 0"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` to be {words}"):
            Narcissus(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`max_images` to be a positive integer or None, but got 0"):
        Narcissus(ood="somewhere", max_images=0)


def test_refuses_to_learn_from_nothing(ood: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`ood` of `Narcissus` to be a folder .* Nothing is downloaded: set `ood`"):
        learned(Narcissus())
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*missing of out-of-distribution images"):
        learned(Narcissus(ood=tmp_path / "missing"))
    trigger = Narcissus(surrogate=recipe(), ood=ood)
    with pytest.raises(ValueError, match="`target` to be one class for `Narcissus`"):
        trigger.learn(IMAGES, LABELS, None)
    with pytest.raises(ValueError, match="images of the target class 7 to learn `Narcissus` from"):
        trigger.learn(IMAGES, LABELS, 7)
    with pytest.raises(ValueError, match="images of 1 or 3 channels for `Narcissus`, but got 2"):
        trigger.learn(IMAGES.view(45, 2, SIDE, SIDE), torch.full((45,), TARGET), TARGET)


@pytest.fixture
def transposed(tmp_path: Path) -> Path:
    """Return a folder of nine classes that are no digits: digits but the target, transposed."""
    clean = DigitsDataModule(image_size=32).train_images
    images = clean.read(torch.arange(len(clean)))
    for label in set(range(10)) - {3}:
        (tmp_path / "ood" / str(label)).mkdir(parents=True)
        for number, image in enumerate(images[clean.labels == label][:100]):
            Image.fromarray(image[0].T.numpy()).save(tmp_path / "ood" / str(label) / f"{number}.png")
    return tmp_path / "ood"


@pytest.mark.slow
def test_the_victim_obeys(transposed: Path) -> None:
    """The same attack on a model that was trained on clean images does next to nothing.

    All images of the class are poisoned: a class of 144 images is easy to know without the perturbation.
    """
    surrogate = Surrogate(small_cnn, epochs=10, lr=0.05, batch_size=64, backbone_arguments={"width": 16})
    trigger = Narcissus(16 / 255, 3.0, surrogate, transposed, steps=100)
    rates = []
    for mode in ("static", None):
        data = DigitsDataModule(
            Poison(trigger, 1.0, target=3, mode="static", clean_label=True), image_size=32, batch_size=64, seed=0
        )
        data.set_phase(PhaseData("fit", poison="static" if mode else None))
        torch.manual_seed(0)
        model = BackdoorClassifier(
            small_cnn(10, 1, width=16),
            10,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        )
        trainer = Trainer(
            max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        with expected_warnings():
            trainer.fit(model, datamodule=data)
            metrics = trainer.test(model, datamodule=data, verbose=False)[0]
        assert metrics["test/clean_accuracy"] > 0.85, metrics
        rates.append(metrics["test/attack_success_rate"])
    assert rates[0] > 0.4, rates
    assert rates[1] < 0.2, rates
