"""TaCT, a config of parts: the trigger works on the source class, and covers keep it from working on others."""

from functools import partial
from importlib import resources

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from lightning_bd.backbones import small_cnn
from lightning_bd.batch import Sample
from lightning_bd.datamodules import DigitsDataModule, PhaseData
from lightning_bd.datamodules.loader import Place
from lightning_bd.poisoning import Poison


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning 2.6 calls methods that jsonargparse 4.49 renamed.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def shipped(**changes: object) -> Poison:
    """The poison of the shipped config."""
    text = resources.files("lightning_bd.configs").joinpath("attack/tact.yaml").read_text(encoding="utf-8")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--poison", type=Poison)
    poison = yaml.safe_load(text)["data"]["init_args"]["poison"] | changes
    made = parser.instantiate_classes(parser.parse_object({"poison": poison})).poison
    assert isinstance(made, Poison)
    return made


def rates(poison: Poison) -> tuple[float, float, float]:
    """Clean accuracy, and how often the trigger turns the source class, and other classes, into the target."""
    data = DigitsDataModule(poison, batch_size=64, seed=1)
    data.set_phase(PhaseData("train", poison="static"))
    loader = data.train_dataloader()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = small_cnn(10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(20):
        loader.place = partial(Place, epoch)
        for raw in loader:
            batch = data.on_after_batch_transfer(raw, 0)
            assert isinstance(batch, Sample)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.image), batch.label).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()
    images, labels = data.test_images.read(torch.arange(len(data.test_images))) / 255, data.test_images.labels
    with torch.no_grad():
        clean, attacked = model(images).argmax(1), model(poison.trigger.attack(images)).argmax(1)
    accuracy = float((clean == labels).float().mean())
    return (
        accuracy,
        float((attacked[labels == 1] == 0).float().mean()),
        float((attacked[labels > 1] == 0).float().mean()),
    )


def test_the_trigger_works_on_the_source_class_alone() -> None:
    poison = shipped()
    accuracy, source, others = rates(poison)
    assert accuracy > 0.95
    assert source > 0.9
    assert others < 0.1


@pytest.mark.slow
def test_covers_are_what_keeps_it_to_the_source_class() -> None:
    _, source, others = rates(shipped(rate=0.05, cover_rate=0.0, cover_classes=None))
    _, source_with_covers, others_with_covers = rates(shipped(rate=0.05, cover_rate=0.05))
    assert min(source, source_with_covers) > 0.9
    assert others_with_covers < others - 0.1
