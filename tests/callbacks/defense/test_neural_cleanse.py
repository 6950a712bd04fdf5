"""Neural Cleanse on backdoored and clean networks; the inversion itself is tested with its functions."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from lightning_bd import backbones
from lightning_bd.callbacks.defense.base import DefenderData, NotApplicableError, Report
from lightning_bd.callbacks.defense.neural_cleanse import NeuralCleanse
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.trigger_inversion import TriggerInversion, stamp

Pairs = Iterator[tuple[Tensor, Tensor]]
#: Enough for small_cnn on the digits, in seconds. With so few images per step one lucky batch can keep too small a
#: mask: seed 0 flags class 5 beside class 0, and 60 steps flag classes of some clean networks. 60 steps of 100 images
#: with seed 0 flag class 0 alone.
QUICK: dict[str, Any] = {"steps": 90, "images_per_step": 32, "seed": 1}


class Attacked(Protocol):
    """What conftest's fixtures are."""

    trained: nn.Module
    data: DefenderData
    datamodule: DigitsDataModule

    def model(self) -> nn.Module: ...
    def rates(self, model: nn.Module) -> tuple[float, float]: ...
    def check_removed(self, model: nn.Module) -> tuple[float, float]: ...


def own_pixels(classes: int) -> Tensor:
    """``(classes, 64)``: which of the first 56 pixels of an 8x8 image belong to a class."""
    return F.one_hot(torch.arange(56) % classes, classes).T.float() @ torch.eye(56, 64)


def make_batches(classes: int = 8, sizes: tuple[int, ...] = (8, 8, 5)) -> list[tuple[Tensor, Tensor]]:
    """A class's pixels are at about 0.5, the others at about 0, the last eight exactly."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in sizes:
        labels = torch.randint(classes, (size,), generator=generator)
        noise = torch.rand(size, 64, generator=generator) * (torch.arange(64) < 56)
        batches.append(((0.45 * own_pixels(classes)[labels] + 0.1 * noise).view(size, 1, 8, 8), labels))
    return batches


def make_data(
    batches: list[tuple[Tensor, Tensor]], classes: int = 8, epoch_limit: int | None = None, **options: Any
) -> DefenderData:
    def train(epoch: int) -> Pairs:
        first = epoch % max(1, len(batches))
        return iter([*batches[first:], *batches[:first]])

    return DefenderData(train, lambda: iter(batches), classes, epoch_limit, **options)


def make_model(classes: int = 8, shortcuts: tuple[int, ...] = (2,)) -> nn.Module:
    """Sees how bright each class's pixels are; one of the last pixels, if bright, leads to a class of ``shortcuts``.

    In training mode, but for one part, and with another part frozen.
    """
    linear = nn.Linear(64, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(1.5, 2.5, classes)[:, None] * own_pixels(classes))
        linear.bias.zero_()
        for number, label in enumerate(shortcuts):
            linear.weight[label, 63 - number] = 20.0
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False, momentum=0.01), nn.Identity(), linear)
    model[2].eval()
    linear.bias.requires_grad_(False)
    return model


def run(model: nn.Module, data: DefenderData, **options: Any) -> Report:
    chosen = {"steps": 60, "images_per_step": 8, "cost": 0.05, **options}
    return NeuralCleanse(**chosen).purify(model, data)


@pytest.mark.parametrize("shortcuts", [(2,), (0, 4)])
def test_classes_with_a_shortcut_are_flagged(shortcuts: tuple[int, ...]) -> None:
    model, data = make_model(shortcuts=shortcuts), make_data(make_batches())
    report = run(model, data, max_epochs=2)
    indices = [report.values[f"anomaly_index_{label}"] for label in range(8)]
    norms = [report.values[f"mask_norm_{label}"] for label in range(8)]
    assert report.values["flagged"] == len(shortcuts)
    assert all(norms[label] < 1.5 for label in shortcuts)
    largest = max(indices[label] for label in shortcuts)
    assert report.note == f"detected: class {', '.join(map(str, shortcuts))} (largest anomaly index {largest:.1f})"
    assert report.epochs == 2
    assert report.values["inversion_steps"] == 60
    for number, label in enumerate(shortcuts):
        mask, pattern = report.images[f"class_{label}_mask"], report.images[f"class_{label}_pattern"]
        assert mask.argmax().item() == 63 - number
        torch.testing.assert_close(report.images[f"class_{label}_trigger"], mask * pattern)
        assert norms[label] == pytest.approx(mask.sum().item())


def test_without_an_outlier_the_model_is_as_it_was() -> None:
    model = make_model(shortcuts=())
    before = copy.deepcopy(model)
    report = run(model, make_data(make_batches()))
    below = sorted(range(8), key=lambda label: report.values[f"mask_norm_{label}"])[:4]
    largest = max(report.values[f"anomaly_index_{label}"] for label in below)
    assert largest < 2
    assert report.note == f"not detected (largest anomaly index {largest:.1f})"
    assert (report.epochs, report.values["flagged"]) == (0, 0)
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_large_mask_is_no_anomaly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a small one that did not work."""
    norms = torch.tensor([5.0, 5.5, 6.0, 16.0, 0.1])

    def adapt(self: TriggerInversion) -> bool:
        self.masks = norms.view(5, 1, 1, 1).expand(5, 1, 8, 8) / 64
        self.reached = torch.tensor([True] * 4 + [works])
        return True

    monkeypatch.setattr(TriggerInversion, "adapt", adapt)
    works = False
    report = run(make_model(5), make_data(make_batches(5), 5))
    # Median 5.5, deviations 0.5, 0, 0.5, 10.5, 5.4, so MAD 0.5.
    assert report.values["anomaly_index_3"] == pytest.approx(10.5 / (1.4826 * 0.5), rel=1e-4)
    assert report.values["anomaly_index_4"] == pytest.approx(5.4 / (1.4826 * 0.5), rel=1e-4)
    assert report.note == "not detected (largest anomaly index 0.7); no trigger found for 1 classes"
    works = True
    report = run(make_model(5), make_data(make_batches(5), 5))
    assert report.note == "detected: class 4 (largest anomaly index 7.3)"


def test_unlearning_equals_a_loop_by_hand() -> None:
    model, reference, data = make_model(), make_model(), make_data(make_batches())
    report = run(model, data, unlearn_share=0.5, learning_rate=0.02, momentum=0.8, max_epochs=3, seed=4)
    assert report.note.startswith("detected: class 2 ")
    mask, pattern = report.images["class_2_mask"], report.images["class_2_pattern"]
    generator = keyed_generator(4, "neural_cleanse", "unlearn")
    reference.train()
    weight = reference.get_parameter("3.weight")
    velocity = torch.zeros_like(weight)
    for epoch in range(3):
        for images, labels in data.train(epoch):
            chosen = torch.rand(len(images), generator=generator) < 0.5
            torch.randint(1, (int(chosen.sum()),), generator=generator)
            mixed = torch.where(chosen[:, None, None, None], (1 - mask) * images + mask * pattern, images)
            (gradient,) = torch.autograd.grad(F.cross_entropy(reference(mixed), labels), weight)
            velocity = 0.8 * velocity + gradient
            with torch.no_grad():
                weight.sub_(0.02 * velocity)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_nothing_stamped_is_fine_tuning() -> None:
    model, reference, data = make_model(), make_model(), make_data(make_batches())
    assert run(model, data, unlearn_share=0.0, learning_rate=0.02, max_epochs=2).epochs == 2
    optimizer = torch.optim.SGD([reference.get_parameter("3.weight")], lr=0.02, momentum=0.9)
    reference.train()
    for epoch in range(2):
        for images, labels in data.train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(reference(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_every_flagged_trigger_is_stamped_with_true_labels() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    images, labels = torch.zeros(400, 1, 2, 2), torch.arange(400) % 3

    class Watching(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append((input.detach(), labels))
            return super().forward(input)

    masks = torch.ones(2, 1, 2, 2)
    patterns = torch.stack([torch.full((1, 2, 2), 0.25), torch.full((1, 2, 2), 0.75)])
    model = nn.Sequential(nn.Flatten(), Watching(4, 3))
    data = make_data([(images, labels)], 3)
    NeuralCleanse(unlearn_share=0.4)._unlearn(model, data, masks, patterns, 1)
    ((given, _),) = seen
    shares = [(given[:, 0] == value).float().mean().item() for value in (0.0, 0.25, 0.75)]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.06)
    assert torch.equal(images, torch.zeros_like(images))


def test_starts_differ_between_classes_and_seeds_and_not_between_runs() -> None:
    image = torch.zeros(1, 3, 4, 4)
    masks, patterns = NeuralCleanse()._start(4, image)
    assert masks.shape == (4, 1, 4, 4)
    assert patterns.shape == (4, 3, 4, 4)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 4
    assert torch.equal(NeuralCleanse()._start(9, image)[0][:4], masks)
    assert not torch.equal(NeuralCleanse(seed=1)._start(4, image)[0], masks)
    assert 0 <= masks.min() <= masks.max() <= 1


def test_two_runs_are_the_same() -> None:
    reports, models = [], [make_model(), make_model()]
    for model in models:
        torch.rand(1)
        reports.append(run(model, make_data(make_batches()), steps=10))
    assert reports[0].values == reports[1].values
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(fails: bool) -> None:
    model = make_model()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    needs = [p.requires_grad for p in model.parameters()]
    frozen, random = model.get_parameter("3.bias").clone(), torch.get_rng_state()
    batches = make_batches()
    copies = copy.deepcopy(batches)
    if fails:
        batches.append((torch.zeros(2, 1, 9, 8), torch.zeros(2, dtype=torch.int64)))
        with pytest.raises(RuntimeError, match="size"):
            run(model, make_data(batches))
    else:
        assert run(model, make_data(batches)).epochs == 1
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.get_parameter("3.bias"), frozen)
    assert torch.equal(torch.get_rng_state(), random)
    assert model[1].momentum == 0.01  # type: ignore[index]
    for (images, _), (old, _) in zip(batches, copies, strict=False):
        assert torch.equal(images, old)


@pytest.mark.parametrize(("limit", "steps", "epochs"), [(None, 60, 5), (3, 5, 3), (1, 2, 1)])
def test_the_runs_cap_applies(limit: int | None, steps: int, epochs: int) -> None:
    """A step of at least 9 images takes two of an epoch's three batches; the last one of a cap may be shorter."""
    report = run(make_model(), make_data(make_batches(), epoch_limit=limit), images_per_step=9, max_epochs=5)
    assert report.values["inversion_steps"] == steps
    assert report.epochs == (epochs if report.values["flagged"] else 0)


def test_classes_stop_when_their_masks_stop_shrinking() -> None:
    report = run(make_model(), make_data(make_batches()), steps=400, patience=1)
    assert report.values["inversion_steps"] < 400
    assert report.values["unsettled_classes"] == 0


@pytest.mark.parametrize(("limit", "sizes"), [(1, [4] * 8), (12, [12, 12, 8]), (100, [32])])
def test_the_size_of_a_forward_pass(limit: int, sizes: list[int]) -> None:
    seen: list[int] = []

    class Watching(nn.Flatten):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(len(input))
            return super().forward(input)

    model = nn.Sequential(Watching(), nn.Linear(64, 8))
    run(model, make_data(make_batches(8, (4,))), steps=1, images_per_step=4, images_per_pass=limit)
    assert seen[: len(sizes)] == sizes


def test_a_cap_of_no_epochs_does_nothing() -> None:
    model = make_model()
    report = run(model, make_data(make_batches(), epoch_limit=0))
    assert report == Report(note="not run: the run's cap on epochs is 0")
    assert torch.equal(model.get_parameter("3.weight"), make_model().get_parameter("3.weight"))


def test_of_many_classes_the_flagged_and_the_smallest_are_shown() -> None:
    classes = 24
    report = run(make_model(classes), make_data(make_batches(classes), classes), steps=3)
    shown = sorted({int(name.split("_")[1]) for name in report.images})
    norms = {label: report.values[f"mask_norm_{label}"] for label in range(classes)}
    assert shown == sorted(sorted(norms, key=lambda label: norms[label])[:10])
    assert len(report.images) == 30
    for name, picture in report.images.items():
        assert picture.shape == (1, 8, 8), name
        assert 0 <= picture.min() <= picture.max() <= 1


def test_two_classes_are_too_few() -> None:
    model = make_model(2, shortcuts=(1,))
    with pytest.raises(NotApplicableError, match="outliers among the classes and needs at least 3, not 2"):
        run(model, make_data(make_batches(2), 2))


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(NotApplicableError, match="every parameter is frozen: unfreeze some"):
        run(make_model().requires_grad_(False), make_data(make_batches()))


def test_no_images_are_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="no training images: give the phase a larger split"):
        run(make_model(), make_data([]))


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda: backbones.resnet18(3, in_channels=1, width=2), 1),
        (lambda: backbones.preact_resnet18(3, in_channels=1, width=2), 1),
        (lambda: backbones.vgg11_bn(3, in_channels=1, width=2), 1),
        (lambda: VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3), 3),
    ],
    ids=["resnet18", "preact_resnet18", "vgg11_bn", "vit"],
)
def test_runs_on_every_kind_of_network(make: Callable[[], nn.Module], channels: int) -> None:
    batches = [(x.repeat(1, channels, 1, 1), y) for x, y in make_batches(3, (4,))]
    batches = [(x.repeat_interleave(2, 2).repeat_interleave(2, 3), y) for x, y in batches]
    torch.manual_seed(0)
    report = run(make(), make_data(batches, 3), steps=2)
    assert report.images["class_1_pattern"].shape == (channels, 16, 16)
    assert all(math.isfinite(value) for value in report.values.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(dtype: torch.dtype) -> None:
    batches = [(images.to(dtype), labels) for images, labels in make_batches()]
    model = make_model().to(dtype)
    report = run(model, make_data(batches))
    assert report.note.startswith("detected: class 2 ")
    assert report.epochs == 1
    assert not torch.equal(model.get_parameter("3.weight"), make_model().to(dtype).get_parameter("3.weight"))


def test_mixed_precision() -> None:
    def forward_context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    report = run(make_model(), make_data(make_batches(), forward_context=forward_context))
    assert report.note.startswith("detected: class 2 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "`steps` to be a positive integer, but got 0"),
        ({"images_per_step": 0}, "`images_per_step` to be a positive integer, but got 0"),
        ({"patience": -1}, "`patience` to be a positive integer, but got -1"),
        ({"max_epochs": 0}, "`max_epochs` to be a positive integer, but got 0"),
        ({"images_per_pass": 0}, "`images_per_pass` to be a positive integer, but got 0"),
        ({"inversion_learning_rate": 0.0}, "`inversion_learning_rate` to be a positive float"),
        ({"cost": 0.0}, "`cost` to be a positive float"),
        ({"learning_rate": math.nan}, "`learning_rate` to be a positive float, but got nan"),
        ({"cost_multiplier": 1.0}, r"`cost_multiplier` to be a float above 1, but got 1\.0"),
        ({"success_threshold": 0.0}, r"`success_threshold` to be in \(0, 1\], but got 0\.0"),
        ({"momentum": 1.0}, r"`momentum` to be in \[0, 1\), but got 1\.0"),
        ({"unlearn_share": -0.1}, r"`unlearn_share` to be in \[0, 1\], but got -0\.1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        NeuralCleanse(**arguments)


def test_the_backdoor_is_found_and_removed(attacked_small_cnn: Attacked) -> None:
    model = attacked_small_cnn.model()
    report = NeuralCleanse(**QUICK).purify(model, attacked_small_cnn.data)
    assert report.note.startswith("detected: class 0 (")
    mask = report.images["class_0_mask"][0]
    corner = torch.zeros_like(mask)
    corner[-2:, -2:] = 1
    assert (mask * corner).sum() > 0.9 * mask.sum(), "the mask lies within the true patch"
    assert mask.sum() < 4
    trigger = report.images["class_0_trigger"][0]
    assert trigger[mask > 0.5].min() > 0.5, "which is white"
    assert report.values["success_0"] >= 0.99
    attacked_small_cnn.check_removed(model)

    # Held against the attacked model, the inverted trigger works on images that it has not seen.
    images = torch.cat([images for images, _ in attacked_small_cnn.data.validation()])
    stamped = stamp(images, report.images["class_0_mask"], report.images["class_0_pattern"])
    with torch.no_grad():
        assert (attacked_small_cnn.trained(stamped).argmax(1) == 0).float().mean() > 0.9
        assert (model.eval()(stamped).argmax(1) == 0).float().mean() < 0.5


def test_a_clean_model_is_not_flagged(attacked_small_cnn: Attacked) -> None:
    datamodule = copy.deepcopy(attacked_small_cnn.datamodule)
    datamodule.set_phase(PhaseData("inject", ("inject",), None, 64))
    torch.manual_seed(0)
    model = backbones.small_cnn(10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        for raw in datamodule.train_dataloader():
            images, labels = datamodule.on_after_batch_transfer(raw, 0)[:2]
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert attacked_small_cnn.rates(model)[0] > 0.95
    before = copy.deepcopy(model.state_dict())
    report = NeuralCleanse(**QUICK).purify(model, attacked_small_cnn.data)
    assert report.note.startswith("not detected (")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
