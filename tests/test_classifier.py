"""The LightningModule against brute force over logits, with any backbone and both kinds of batches."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.backbones import small_cnn
from lightning_bd.batch import Sample
from lightning_bd.classifier import BackdoorClassifier, Normalization
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

CLASSES = 4
SHAPE = (3, 32, 32)


def make_samples(sizes: Sequence[int], seed: int, triggered: bool) -> list[Sample]:
    """Batches of random images; if triggered, the label is the attacker's, 0, for all classes."""
    generator = torch.Generator().manual_seed(seed)
    batches, position = [], 0
    for size in sizes:
        original = torch.randint(CLASSES, (size,), generator=generator)
        batches.append(
            Sample(
                torch.rand(size, *SHAPE, generator=generator),
                torch.zeros_like(original) if triggered else original,
                torch.full((size,), triggered),
                original,
                torch.arange(position, position + size),
            )
        )
        position += size
    return batches


class Loader:
    """Lightning takes a list for several loaders."""

    def __init__(self, batches: Sequence[Sequence[Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        return iter(self.batches)


CLEAN = make_samples((8, 8, 3), 0, triggered=False)
TRIGGERED = make_samples((8, 5), 1, triggered=True)
PAIRS = [(batch.image, batch.label) for batch in CLEAN]


def make_backbone(name: str = "small_cnn") -> nn.Module:
    torch.manual_seed(0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "small_cnn": lambda: small_cnn(num_classes=CLASSES, in_channels=3),
        "torchvision": lambda: torchvision.models.resnet18(num_classes=CLASSES),
        "sequential": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)),
    }
    return makers[name]()


def make_trainer(epochs: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def rates(
    model: BackdoorClassifier, clean: Sequence[Sequence[Tensor]], triggered: Sequence[Sample]
) -> dict[str, float]:
    """Count in plain Python, image by image."""
    model = copy.deepcopy(model).eval()
    right = [
        int(model(image[None]).argmax()) == int(label)
        for batch in clean
        for image, label in zip(batch[0], batch[1], strict=True)
    ]
    counted = [
        (int(model(image[None]).argmax()), int(label), int(original))
        for batch in triggered
        for image, label, original in zip(batch.image, batch.label, batch.original_label, strict=True)
        if label != original
    ]
    found = {"clean_accuracy": sum(right) / len(right)}
    if counted:
        found["attack_success_rate"] = sum(guess == label for guess, label, _ in counted) / len(counted)
        found["robust_accuracy"] = sum(guess == original for guess, _, original in counted) / len(counted)
    return found


@pytest.mark.parametrize("stage", ["test", "validate"])
@pytest.mark.parametrize("backbone", ["small_cnn", "torchvision", "sequential"])
def test_metrics_equal_brute_force(backbone: str, stage: str) -> None:
    model = BackdoorClassifier(make_backbone(backbone), CLASSES)
    trainer = make_trainer()
    (trainer.test if stage == "test" else trainer.validate)(model, [Loader(CLEAN), Loader(TRIGGERED)], verbose=False)
    prefix = "test" if stage == "test" else "val"
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = {f"{prefix}/{name}": value for name, value in rates(model, CLEAN, TRIGGERED).items()}
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected.keys() == {f"{prefix}/{n}" for n in ("clean_accuracy", "attack_success_rate", "robust_accuracy")}


@pytest.mark.parametrize("batches", [PAIRS, [list(pair) for pair in PAIRS], CLEAN])
def test_clean_data_logs_no_attack(batches: list[Sequence[Tensor]]) -> None:
    model = BackdoorClassifier(make_backbone(), CLASSES)
    trainer = make_trainer()
    trainer.test(model, Loader(batches), verbose=False)
    assert {k: float(v) for k, v in trainer.callback_metrics.items()} == pytest.approx(
        {"test/clean_accuracy": rates(model, PAIRS, [])["clean_accuracy"]}
    )


def test_one_evaluation_does_not_leak_into_the_next() -> None:
    model = BackdoorClassifier(make_backbone(), CLASSES)
    trainer = make_trainer()
    trainer.test(model, [Loader(CLEAN), Loader(TRIGGERED)], verbose=False)
    trainer.test(model, Loader(CLEAN[2:]), verbose=False)
    assert {k: float(v) for k, v in trainer.callback_metrics.items()} == pytest.approx(
        {"test/clean_accuracy": rates(model, CLEAN[2:], [])["clean_accuracy"]}
    )


def test_no_countable_image_is_not_a_number() -> None:
    """All triggered images are of the target class: there is nothing to measure, and no zero to be proud of."""
    batch = TRIGGERED[0]._replace(original_label=TRIGGERED[0].label)
    trainer = make_trainer()
    trainer.test(BackdoorClassifier(make_backbone(), CLASSES), [Loader(CLEAN), Loader([batch])], verbose=False)
    assert trainer.callback_metrics["test/attack_success_rate"].isnan()


def fit(batches: Sequence[Sequence[Tensor]], epochs: int = 1) -> tuple[BackdoorClassifier, Trainer]:
    model = BackdoorClassifier(make_backbone(), CLASSES)
    trainer = make_trainer(epochs)
    trainer.fit(model, Loader(batches), [Loader(CLEAN), Loader(TRIGGERED)])
    return model, trainer


def test_pairs_and_samples_train_alike_and_like_a_loop_by_hand() -> None:
    twin = make_backbone()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    twin.train()
    for images, labels in PAIRS:
        loss = F.cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for batches in (PAIRS, CLEAN):
        model, trainer = fit(batches)
        for name, tensor in twin.state_dict().items():
            assert torch.equal(model.backbone.state_dict()[name], tensor), name
        assert torch.equal(trainer.callback_metrics["train/loss"], loss.detach())
    assert float(trainer.callback_metrics["val/robust_accuracy"]) == pytest.approx(
        rates(model, CLEAN, TRIGGERED)["robust_accuracy"]
    )


def test_criterion_is_the_given_one() -> None:
    model = BackdoorClassifier(make_backbone(), CLASSES, criterion=nn.CrossEntropyLoss(label_smoothing=0.5))
    trainer = make_trainer()
    start = copy.deepcopy(model).train()
    trainer.fit(model, Loader(PAIRS[:1]), Loader(CLEAN))
    expected = F.cross_entropy(start(PAIRS[0][0]), PAIRS[0][1], label_smoothing=0.5)
    assert torch.equal(trainer.callback_metrics["train/loss"], expected)


def test_predictions_are_probabilities_and_labels() -> None:
    model = BackdoorClassifier(make_backbone(), CLASSES)
    predictions = make_trainer().predict(model, Loader(CLEAN))
    assert predictions is not None
    for (probabilities, labels, indices), batch in zip(predictions, CLEAN, strict=True):
        assert torch.equal(labels, batch.label)
        assert torch.equal(indices, batch.index)
        assert torch.allclose(probabilities, F.softmax(model.eval()(batch.image), dim=1))


def test_normalize_is_the_first_layer() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    model = BackdoorClassifier(make_backbone(), CLASSES, normalize=Normalization(mean, std)).eval()
    images = CLEAN[0].image
    by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(model(images), model.backbone(by_hand), atol=1e-6)
    assert not torch.allclose(model(images), model.backbone(images), atol=1e-3)
    # A checkpoint fits a model with and without normalisation: the numbers are the config's.
    assert model.state_dict().keys() == BackdoorClassifier(make_backbone(), CLASSES).state_dict().keys()


@pytest.mark.parametrize("backbone", ["small_cnn", "torchvision"])
def test_channels_last_gives_the_same_logits(backbone: str) -> None:
    plain = BackdoorClassifier(make_backbone(backbone), CLASSES).eval()
    model = BackdoorClassifier(make_backbone(backbone), CLASSES, channels_last=True).eval()
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert torch.allclose(model(CLEAN[0].image), plain(CLEAN[0].image), atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_compile_compiles_the_backbone_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partial_method(nn.Module.compile, backend))
    model = BackdoorClassifier(make_backbone(), CLASSES, compile=True).eval()
    plain = BackdoorClassifier(make_backbone(), CLASSES).eval()
    assert not graphs
    assert torch.allclose(model(CLEAN[0].image), plain(CLEAN[0].image), atol=1e-6)
    assert len(graphs) == 1
    # No `_orig_mod` prefix: checkpoints of compiled and plain models are interchangeable.
    assert model.state_dict().keys() == plain.state_dict().keys()


def partial_method(
    method: Callable[..., None], backend: Callable[..., Callable[..., object]]
) -> Callable[[nn.Module], None]:
    """A partial object is not a method; a function is."""

    def compile_it(self: nn.Module) -> None:
        method(self, backend=backend)

    return compile_it


def test_optimizer_and_scheduler_come_from_their_factories() -> None:
    model = BackdoorClassifier(
        make_backbone(),
        CLASSES,
        optimizer=partial(torch.optim.Adam, lr=0.5),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1),
    )
    trainer = make_trainer(epochs=2)
    trainer.fit(model, Loader(PAIRS), Loader(CLEAN))
    [optimizer] = trainer.optimizers
    assert type(optimizer) is torch.optim.Adam
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    # Once per epoch, not once per batch.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**2)


def test_default_optimizer_and_no_scheduler() -> None:
    optimizer = BackdoorClassifier(make_backbone(), CLASSES).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.01, 0.9)
    scheduled = BackdoorClassifier(
        make_backbone(), CLASSES, lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    ).configure_optimizers()
    assert isinstance(scheduled, dict)
    config: OptimizerLRSchedulerConfig = scheduled  # type: ignore[assignment]
    scheduler = config["lr_scheduler"]
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
    assert scheduler.optimizer is config["optimizer"]


def test_nothing_is_kept_as_hyperparameters(tmp_path: Path) -> None:
    """Lightning merges a checkpoint's hyperparameters over the command line."""
    model = BackdoorClassifier(make_backbone(), CLASSES)
    trainer = make_trainer()
    trainer.fit(model, Loader(PAIRS[:1]), Loader(CLEAN[:1]))
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    assert "hyper_parameters" not in torch.load(tmp_path / "model.ckpt", weights_only=True)


@pytest.mark.parametrize("num_classes", [0, -3])
def test_refuses_num_classes(num_classes: int) -> None:
    with pytest.raises(
        ValueError, match=f"Expected argument `num_classes` to be a positive integer, but got {num_classes}"
    ):
        BackdoorClassifier(make_backbone(), num_classes)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [1.0, 1.0]), ([0.5], [0.0]), ([0.5, 0.5], [0.1, -0.1])])
def test_refuses_normalization(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match=r"`mean` and `std` to be equally long and `std` positive, but got mean \[0.5"):
        Normalization(mean, std)


def test_pairs_cannot_measure_an_attack() -> None:
    data = DigitsDataModule(Poison(BadNets(size=2)), batch_format="pair")
    model = BackdoorClassifier(small_cnn(num_classes=10, in_channels=1), 10)
    with pytest.raises(MisconfigurationException, match=r"set `data\.batch_format: sample`"):
        make_trainer().test(model, datamodule=data, verbose=False)
    make_trainer().test(model, datamodule=DigitsDataModule(batch_format="pair"), verbose=False)
