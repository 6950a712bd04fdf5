"""A trained trigger in a checkpoint that says nothing else of the attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bd.attacks import LIRA
from lightning_bd.checkpointing import TRIGGER_KEY, read_checkpoint, save_atomically
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.commands.checkpoints import take_over
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.phases import MultiPhaseTrainer
from lightning_bd.triggers import BadNets, LIRATrigger, SequentialTrigger, Trigger

if TYPE_CHECKING:
    from tests.attacks.conftest import Lab

GREY = torch.full((1, 1, 8, 8), 0.5)


def noise(data: DigitsDataModule) -> Tensor:
    assert data.poison is not None
    assert isinstance(data.poison.trigger, LIRATrigger)
    return data.poison.trigger.noise(GREY)


def trainer_of(folder: Path, **others: Any) -> MultiPhaseTrainer:
    return MultiPhaseTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=False, num_sanity_val_steps=0, **others,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], Tensor]:
    """A checkpoint of a Trainer without phases, its model's rates, and its trigger."""
    folder, data = tmp_path_factory.mktemp("plain"), lab.data(lab.lira_trigger())
    model = LIRA(lab.backbone(), 10, generator_lr=0.01)
    trainer = trainer_of(folder, max_epochs=2, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "plain.ckpt", weights_only=False)
    rates = trainer.test(model, datamodule=data, verbose=False)[0]
    return folder / "plain.ckpt", dict(rates), noise(data)


def changed(path: Path, folder: Path, weights: object) -> Path:
    """A copy of a checkpoint with another trigger; ``None`` for none."""
    checkpoint = read_checkpoint(path)
    del checkpoint[TRIGGER_KEY]
    if weights is not None:
        checkpoint[TRIGGER_KEY] = weights
    save_atomically(checkpoint, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize("kind", [LIRA, BackdoorClassifier])
@pytest.mark.parametrize("override", [False, True])
def test_the_trained_weights_are_measured(
    plain: tuple[Path, dict[str, float], Tensor], lab: Lab, kind: type[BackdoorClassifier], override: bool
) -> None:
    path, rates, trained = plain
    data = lab.data(lab.lira_trigger())
    model = LIRA(lab.backbone(), 10, generator_lr=0.01) if kind is LIRA else BackdoorClassifier(lab.backbone(), 10)
    trainer = trainer_of(path.parent)
    trainer.override_trigger = override
    data.setup()
    assert not torch.equal(noise(data), trained)
    assert trainer.test(model, datamodule=data, ckpt_path=path, verbose=False)[0] == rates
    assert torch.equal(noise(data), trained)


def test_commands_take_them_where_the_config_is_to_tell_the_attack(
    plain: tuple[Path, dict[str, float], Tensor], lab: Lab
) -> None:
    path, _, trained = plain
    model, data = BackdoorClassifier(lab.backbone(), 10), lab.data(lab.lira_trigger())
    assert take_over(path, model, data, override_trigger=True) is None
    assert torch.equal(noise(data), trained)
    take_over(path, model, data)
    assert data.poison is None


@pytest.mark.parametrize(
    "trigger",
    [LIRATrigger(0.3, width=4, depth=1), SequentialTrigger([BadNets(2), LIRATrigger(0.3, width=4, depth=1)])],
    ids=["alone", "nested"],
)
def test_a_trigger_without_its_weights_is_refused(
    plain: tuple[Path, dict[str, float], Tensor], lab: Lab, tmp_path: Path, trigger: Trigger
) -> None:
    path, model = changed(plain[0], tmp_path, None), BackdoorClassifier(lab.backbone(), 10)
    data, trainer = lab.data(trigger), trainer_of(tmp_path)
    words = r"is trained with the model, but .*changed\.ckpt holds neither a manifest nor the trigger's weights"
    with pytest.raises(MisconfigurationException, match=rf"{words}.*`data\.poison` out.*`--override-trigger`"):
        trainer.test(model, datamodule=data, ckpt_path=path, verbose=False)
    trainer.override_trigger = True
    with pytest.warns(UserWarning, match=words):
        trainer.test(model, datamodule=data, ckpt_path=path, verbose=False)
    with pytest.warns(UserWarning, match=words):
        take_over(path, model, data, override_trigger=True)
    clean = lab.data(BadNets(2))
    assert trainer_of(tmp_path).test(model, datamodule=clean, ckpt_path=path, verbose=False)


def test_the_weights_of_another_trigger_are_refused(
    plain: tuple[Path, dict[str, float], Tensor], lab: Lab, tmp_path: Path
) -> None:
    path, model, trainer = plain[0], BackdoorClassifier(lab.backbone(), 10), trainer_of(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"a trigger that was trained .* but the config's is `BadNets`"):
        trainer.test(model, datamodule=lab.data(BadNets(2)), ckpt_path=path, verbose=False)
    wide = lab.data(LIRATrigger(0.3, width=8, depth=1))
    with pytest.raises(
        ValueError, match=r"trigger in .*plain\.ckpt are not those of the config's `LIRATrigger`: .*shape"
    ):
        trainer.test(model, datamodule=wide, ckpt_path=path, verbose=False)
    weights = read_checkpoint(path)[TRIGGER_KEY]
    name = next(iter(weights))
    nan = torch.full_like(weights[name], torch.nan)
    for broken, word in (({**weights, name: nan}, "finite"), ({name: nan}, "named"), (3, "mapping, but got a int")):
        with pytest.raises(ValueError, match=rf"are not those of the config's `LIRATrigger`: .*{word}"):
            trainer.test(
                model, datamodule=lab.data(lab.lira_trigger()), ckpt_path=changed(path, tmp_path, broken), verbose=False
            )
    trainer.override_trigger = True
    assert trainer.test(model, datamodule=lab.data(BadNets(2)), ckpt_path=path, verbose=False)
