"""What a run of phases keeps of its attack: the manifest, and the pixels of a trigger that cannot be made again."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bd.datamodules import ImageDataModule, PhaseData
from lightning_bd.manifest import PoisonManifest
from lightning_bd.triggers import Trigger
from lightning_bd.triggers.learned import LearnedTrigger, unlearned

__all__ = ("AttackRecord",)


class AttackRecord:
    """The attack of one run.

    Args:
        datamodule: The data, with its poison.
        given: The attack's record, where it is not the datamodule's to tell.
        saved: Whether the record is written beside the run and into its checkpoints.
        poisoned: Whether a phase of the run is poisoned.

    Raises:
        MisconfigurationException: If the trigger would be lost, because it is trained or learnt and nothing is saved.
    """

    def __init__(
        self, datamodule: ImageDataModule, given: PoisonManifest | None, *, saved: bool, poisoned: bool
    ) -> None:
        self._datamodule = datamodule
        self._given = given
        self._saved = saved
        self._poisoned = poisoned
        if saved or not poisoned:
            return
        for trigger, how in ((self.trained_trigger, "trained"), (self.learned_trigger, "learnt from images")):
            if trigger is not None:
                raise MisconfigurationException(
                    f"`{type(trigger).__name__}` is {how}, and the manifest keeps its weights: set "
                    "`trainer.save_manifest: true`."
                )

    @property
    def trained_trigger(self) -> Trigger | None:
        """The trigger, if the model may train it in a phase of this run."""
        poison = self._datamodule.poison
        if poison is None or not self._poisoned:
            return None
        return poison.trigger if poison.trigger.is_trained else None

    @property
    def learned_trigger(self) -> Trigger | None:
        """The trigger, if it is learnt from the attacker's images and this run's to record."""
        poison = self._datamodule.poison
        if poison is None or self._given is not None or poison.trigger.is_trained:
            return None
        learned = any(isinstance(part, LearnedTrigger) for part in poison.trigger.modules())
        return poison.trigger if learned else None

    def manifest(self, phases: Iterable[PhaseData]) -> PoisonManifest | None:
        """Return the record to save; ``None`` if there is none, or nothing is saved.

        Args:
            phases: The phases whose poisoned images it lists.
        """
        if not self._saved:
            return None
        return self._given if self._given is not None else self._datamodule.manifest(tuple(phases))

    def save(self, folder: Path, phases: Iterable[PhaseData]) -> None:
        """Write :meth:`manifest` into a folder, if there is one.

        Args:
            folder: Of the run.
            phases: The phases whose poisoned images it lists.
        """
        manifest = self.manifest(phases)
        if manifest is not None:
            manifest.save(folder)

    def restore(self, folder: Path) -> None:
        """Take a learnt trigger from the run that goes on: learnt again, it could be another one.

        Args:
            folder: Of the run.

        Raises:
            MisconfigurationException: If the trigger was learnt already and is another one.
        """
        trigger = self.learned_trigger
        if trigger is None or not (folder / "manifest.json").is_file():
            return
        manifest, mine = PoisonManifest.load(folder), self._datamodule.manifest(learn=False)
        assert mine is not None
        # Any other difference is found, with all others, when the folder is opened.
        if manifest.differences(mine, pixels=False):
            return
        if unlearned(trigger):
            manifest.restore(trigger)
        _check_pixels(trigger, manifest.tensors, folder)

    def take(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Give the trigger the pixels that a model of this run was trained with, or check that it has them.

        Args:
            tensors: Of the model's record; those named ``trigger.*`` count.
            path: The model's checkpoint, for the message.

        Raises:
            MisconfigurationException: If a learnt trigger is another one.
            ValueError: If the tensors do not fit a trained one.
        """
        if self.trained_trigger is not None:
            mine = {name.removeprefix("trigger."): tensor for name, tensor in _of_trigger(tensors).items()}
            self.trained_trigger.restore(self._datamodule.image_shape, mine)
        elif self.learned_trigger is not None and tensors:
            # Before a clean run measures, only its first process has learnt the trigger.
            self._datamodule.learn_trigger()
            _check_pixels(self.learned_trigger, tensors, path)


def _of_trigger(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("trigger.")}


def _check_pixels(trigger: Trigger, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse to go on from a model of another trigger, or to measure it with this one."""
    now = {f"trigger.{name}": tensor.cpu() for name, tensor in trigger.state_dict().items()}
    before = _of_trigger(tensors)
    if before.keys() != now.keys() or not all(torch.equal(before[name], now[name]) for name in now):
        raise MisconfigurationException(
            f"The trigger of {where} is not this run's: `{type(trigger).__name__}` was learnt again and its pixels "
            "differ. Restore `manifest.json` and `manifest.safetensors` of the run, give another "
            "`trainer.default_root_dir`, or start over with `--fresh` (the old folder is renamed)."
        )
