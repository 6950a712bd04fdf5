"""Label-consistent images against a loop written out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_bd.backbones import small_cnn
from lightning_bd.batch import Sample
from lightning_bd.crafting import LabelConsistent
from lightning_bd.datamodules import DigitsDataModule, ImageDataModule, PhaseData
from lightning_bd.datamodules.loader import BatchLoader, Place
from lightning_bd.poisoning import Poison
from lightning_bd.selection import Surrogate
from lightning_bd.triggers import BadNets, SequentialTrigger
from lightning_bd.triggers.badnets import Position

Finish = Callable[[ImageDataModule, BatchLoader], Sample]


def tiny(num_classes: int, in_channels: int) -> nn.Module:
    return small_cnn(num_classes, in_channels, width=4)


def recipe(epochs: int = 4) -> Surrogate:
    return Surrogate(tiny, epochs=epochs, lr=0.05, batch_size=40)


def attack(**arguments: Any) -> LabelConsistent:
    return LabelConsistent(recipe(), **{"steps": 5, "robust_steps": 0, **arguments})


def digits(count: int = 200) -> tuple[Tensor, Tensor]:
    found = load_digits()
    images = torch.from_numpy(found.images[:count]).mul(15).to(torch.uint8)[:, None]
    return images, torch.from_numpy(found.target[:count]).to(torch.int64)


def crafted(crafting: LabelConsistent, chosen: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return crafting.craft(chosen, torch.arange(len(images)), labels, images.__getitem__)


def of_class(label: int, labels: Tensor, count: int = 10) -> Tensor:
    return (labels == label).nonzero().flatten()[:count]


def test_equals_the_equations() -> None:
    """Image by image; a pixel may differ where the gradient is almost zero."""
    images, labels = digits()
    crafting = attack(epsilon=12 / 255, step_size=2.5 / 255)
    network = crafting.trained(images, labels)
    chosen = of_class(3, labels, 6)
    found = crafting.perturbed(network, images[chosen], labels[chosen])
    differing = 0
    for i, position in enumerate(chosen.tolist()):
        start = images[position : position + 1].float() / 255
        x = start.clone()
        for _ in range(5):
            x = x.detach().requires_grad_(True)
            loss = -network(x).log_softmax(1)[0, 3]
            loss.backward()
            assert x.grad is not None
            x = torch.max(torch.min(x.detach() + 2.5 / 255 * x.grad.sign(), start + 12 / 255), start - 12 / 255)
            x = x.clamp(0, 1)
        differing += int((found[i] != (x[0] * 255).round().to(torch.uint8)).sum())
    assert differing <= 2
    assert not torch.equal(found, images[chosen])


@pytest.mark.parametrize("robust_steps", [0, 2])
def test_the_surrogate_is_misled(robust_steps: int) -> None:
    images, labels = digits(120)
    crafting = LabelConsistent(recipe(10), steps=20, robust_steps=robust_steps)
    network = crafting.trained(images, labels)
    chosen = of_class(3, labels)
    made = crafted(crafting, chosen, images, labels)
    with torch.no_grad():
        before = nn.functional.cross_entropy(network(images[chosen] / 255), labels[chosen], reduction="none")
        after = nn.functional.cross_entropy(network(made / 255), labels[chosen], reduction="none")
    assert (after > before).all()
    assert (after - before).mean() > 0.2


@pytest.mark.parametrize(("epsilon", "levels"), [(16 / 255, 16), (0.062745, 16), (0.05, 12), (1 / 255, 1), (0.003, 0)])
def test_the_budget_holds_after_rounding(epsilon: float, levels: int) -> None:
    images, labels = digits(80)
    images[:, :, :4] = 255
    chosen = of_class(2, labels)
    # Steps that lie between the levels.
    crafting = attack(epsilon=epsilon, step_size=0.7 / 255, steps=40)
    change = crafted(crafting, chosen, images, labels).int() - images[chosen].int()
    assert crafting.levels == levels
    assert change.abs().max() == levels
    assert (change[:, :, :4] <= 0).all()


def test_adversarial_training_is_that_of_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is trained on after two steps of a quarter of the radius, of the network in evaluation mode."""
    images, labels = digits(80)
    seen: list[tuple[Tensor, Tensor]] = []
    train = Surrogate.train

    def watch(self: Surrogate, images: Tensor, labels: Tensor, note: None = None, perturb: Any = None) -> nn.Module:  # noqa: ANN401
        def compare(network: nn.Module, batch: Tensor, wanted: Tensor) -> Tensor:
            moved = perturb(network, batch, wanted)
            assert network.training
            assert all(p.requires_grad for p in network.parameters())
            with torch.enable_grad():
                network.eval()
                x = batch.clone()
                for _ in range(2):
                    x.requires_grad_(True)
                    loss = nn.functional.cross_entropy(network(x), wanted, reduction="sum")
                    (gradient,) = torch.autograd.grad(loss, [x])
                    x = (x.detach() + 0.01 * gradient.sign()).clamp(batch - 0.04, batch + 0.04).clamp(0, 1)
                network.train()
            seen.append((moved, x))
            return torch.as_tensor(moved)

        return train(self, images, labels, note, perturb=compare)

    monkeypatch.setattr(Surrogate, "train", watch)
    LabelConsistent(recipe(1), robust_epsilon=0.04, robust_steps=2).trained(images, labels)
    assert len(seen) == 2
    for moved, expected in seen:
        assert torch.allclose(moved, expected, atol=1e-6)


def test_training_without_a_radius_is_plain_training() -> None:
    images, labels = digits(80)
    plain = attack().trained(images, labels).state_dict()
    zero = LabelConsistent(recipe(), robust_epsilon=0.0, robust_steps=3).trained(images, labels).state_dict()
    robust = LabelConsistent(recipe(), robust_steps=1).trained(images, labels).state_dict()
    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert not all(torch.equal(plain[key], robust[key]) for key in plain)


def test_the_order_of_the_data_set_does_not_matter(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits(80)
    images[33], labels[33] = images[4], labels[4]  # twins: one of them is poisoned
    chosen = of_class(4, labels, 5)
    made = crafted(attack(), chosen, images, labels)
    [file] = cache.iterdir()
    file.unlink()
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    moved = order.argsort()[chosen]
    again = crafted(attack(), moved.sort().values, images[order], labels[order])
    assert torch.equal(again[moved.argsort().argsort()], made)
    assert [path.name for path in cache.iterdir()] == [file.name]
    # Positions need not begin at 0.
    offset = attack().craft(chosen + 7, torch.arange(80) + 7, labels, lambda positions: images[positions - 7])
    assert torch.equal(offset, made)


def test_what_was_made_is_not_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits(80)
    chosen = of_class(1, labels)
    made = crafted(attack(), chosen, images, labels)
    [file] = cache.iterdir()
    assert file.name.startswith("LabelConsistent-")

    def refuse(*args: object, **kwargs: object) -> nn.Module:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(Surrogate, "train", refuse)
        assert torch.equal(crafted(attack(), chosen, images, labels), made)
        for other in (attack(epsilon=0.03), attack(steps=6), LabelConsistent(recipe(5), steps=5, robust_steps=0)):
            with pytest.raises(AssertionError, match="trained again"):
                crafted(other, chosen, images, labels)
        with pytest.raises(AssertionError, match="trained again"):
            crafted(attack(), chosen[1:], images, labels)
        changed = images.clone()
        changed[70, 0, 0, 0] += 1
        with pytest.raises(AssertionError, match="trained again"):
            crafted(attack(), chosen, changed, labels)
        # Nothing but the pixels tells these apart.
        with pytest.raises(AssertionError, match="trained again"):
            crafted(attack(), torch.arange(8), images[:8], torch.zeros(8, dtype=torch.int64))
    crafted(attack(), torch.arange(8), images[:8], torch.zeros(8, dtype=torch.int64))
    with monkeypatch.context() as patched:
        patched.setattr(Surrogate, "train", refuse)
        crafted(attack(), torch.arange(8), images[:8], torch.zeros(8, dtype=torch.int64))
        with pytest.raises(AssertionError, match="trained again"):
            crafted(attack(), torch.arange(8), changed[-12:-4], torch.zeros(8, dtype=torch.int64))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="of crafted images in .* is broken and made anew"):
        assert torch.equal(crafted(attack(), chosen, images, labels), made)
    assert torch.equal(crafted(attack(), chosen, images, labels), made)


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    images, labels = digits(60)
    (tmp_path / "file").write_text("")
    chosen = of_class(1, labels)
    with pytest.warns(UserWarning, match=r"could not be kept for the next run: .*Not a directory.* `cache_dir`"):
        made = crafted(attack(cache_dir=tmp_path / "file" / "folder"), chosen, images, labels)
    assert not cache.exists()
    assert torch.equal(crafted(attack(cache_dir=tmp_path / "mine"), chosen, images, labels), made)
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_no_trace(cache: Path) -> None:
    images, labels = digits(60)
    before, state = images.clone(), torch.get_rng_state()
    chosen = of_class(1, labels)
    with torch.inference_mode():
        made = LabelConsistent(recipe(1), steps=2, robust_steps=1).craft(
            chosen, torch.arange(60), labels, images.__getitem__
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    network = attack().trained(images, labels).train()
    network.zero_grad(set_to_none=True)
    attack().perturbed(network, images[chosen], labels[chosen])
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert made.dtype == torch.uint8


def test_zero_is_the_plain_poison_bit_for_bit(finished: Finish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surrogate, "train", None)
    samples = []
    for crafting in (None, LabelConsistent(epsilon=0.0)):
        poison = Poison(BadNets(2), 0.5, 3, "static", clean_label=True, crafting=crafting)
        data = DigitsDataModule(poison, subset=300, augment="crop_flip", seed=0)
        samples.append(finished(data, data.train_dataloader()))
    assert all(torch.equal(one, other) for one, other in zip(*samples, strict=True))
    assert samples[0].is_poisoned.sum() == 15


def test_only_the_chosen_images_change(finished: Finish) -> None:
    trigger = BadNets(2, pattern="white")
    crafting = attack(epsilon=20 / 255, step_size=6 / 255)
    poison = Poison(trigger, 0.4, 3, "static", clean_label=True, crafting=crafting, cover_rate=0.1)
    data = DigitsDataModule(poison, subset=300, splits={"a": 0.5, "b": 0.5}, seed=0)
    phase = PhaseData("fit", ("a",), "static")
    data.set_phase(phase)
    manifest = data.manifest((phase,))
    assert manifest is not None
    chosen = manifest.tensors["indices.fit"]
    sample = finished(data, data.train_dataloader())
    assert torch.equal(sample.index[sample.is_poisoned], chosen)
    assert torch.equal(sample.label, sample.original_label)
    assert (sample.label[sample.is_poisoned] == 3).all()
    assert len(chosen) == 6
    clean = data.train_images.read(sample.index)
    bytes_ = (sample.image * 255).round().to(torch.uint8)
    change = bytes_.int() - clean.int()
    change[..., -2:, -2:] = 0
    # Covers have the trigger and nothing else.
    assert torch.equal((change != 0).flatten(1).any(1), sample.is_poisoned)
    assert change.abs().max() == 20
    positions = data.positions(("a",))
    made = crafting.craft(chosen, positions, data.train_images.labels[positions], data.train_images.read)
    made[..., -2:, -2:] = 255
    assert torch.equal(bytes_[sample.is_poisoned], made)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epsilon", -0.1, r"`epsilon` to be a float in \[0, 1\], but got -0.1"),
        ("epsilon", 8.0, r"`epsilon` to be a float in \[0, 1\], but got 8.0"),
        ("robust_epsilon", float("nan"), r"`robust_epsilon` to be a float in \[0, 1\], but got nan"),
        ("step_size", 0.0, "`step_size` to be a positive float, but got 0.0"),
        ("steps", 0, "`steps` to be an integer of at least 1, but got 0"),
        ("robust_steps", -1, "`robust_steps` to be an integer of at least 0, but got -1"),
    ],
)
def test_refuses_arguments(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelConsistent(**{name: value})  # type: ignore[arg-type]


def test_needs_clean_labels() -> None:
    with pytest.raises(ValueError, match=r"`clean_label` to be True with LabelConsistent, .* but got False"):
        Poison(BadNets(), mode="static", crafting=LabelConsistent())


def rates(crafting: LabelConsistent | None, seed: int) -> tuple[float, float]:
    """Train a victim; return clean accuracy and attack success."""
    corners: list[Position] = ["top_left", "top_right", "bottom_left", "bottom_right"]
    trigger = SequentialTrigger([BadNets(3, corner, "checkerboard") for corner in corners])
    poison = Poison(trigger, 0.1, 0, "static", clean_label=True, crafting=crafting, seed=seed)
    data = DigitsDataModule(poison, batch_size=64, seed=seed, augment="crop")
    loader = data.train_dataloader()
    torch.manual_seed(seed)
    model = small_cnn(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(30):
        loader.place = lambda epoch=epoch: Place(epoch)  # type: ignore[misc]
        for raw in loader:
            batch = data.on_after_batch_transfer(raw, 0)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()
    found = []
    with torch.no_grad():
        for loader in data.test_dataloader():
            batches = [data.on_after_batch_transfer(raw, 0) for raw in loader]
            found.append(torch.cat([model(batch[0]).argmax(1) == batch[1] for batch in batches]).float().mean().item())
    return found[0], found[1]


@pytest.mark.slow
def test_it_raises_attack_success() -> None:
    """At a rate of a tenth of the class, where the trigger alone is learned only in part."""
    with torch.random.fork_rng(devices=[]):
        plain = rates(None, seed=0)
        surrogate = Surrogate(small_cnn, epochs=15, lr=0.05, batch_size=64)
        stronger = rates(LabelConsistent(surrogate, epsilon=64 / 255, robust_steps=0), seed=0)
    assert stronger[0] > plain[0] - 0.03
    assert stronger[1] > 0.8
    assert stronger[1] > plain[1] + 0.2
