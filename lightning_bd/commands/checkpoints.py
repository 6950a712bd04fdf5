"""Taking over the model and the attack of a checkpoint, for the commands that look at it."""

from collections.abc import Mapping
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lightning_bd.checkpointing import CheckpointError, check_weights, read_checkpoint
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.evaluation import use_manifest_of, use_trained_trigger_of
from lightning_bd.functional.evaluation import check_finite_weights
from lightning_bd.manifest import PoisonManifest
from lightning_bd.phase import Phase
from lightning_bd.phase_setup import attackers_splits

__all__ = ("named_after", "own_data", "take_over")


def take_over(
    path: Path, model: LightningModule, datamodule: ImageDataModule, *, override_trigger: bool = False
) -> PoisonManifest | None:
    """Load a checkpoint's weights into the model, and let the data be triggered as its manifest says.

    Without a manifest the attack is not known, and no triggered images are made.

    Args:
        path: The checkpoint.
        model: Gets the weights.
        datamodule: Gets the poison.
        override_trigger: Keep the config's trigger.

    Returns:
        The checkpoint's manifest, if it has one.

    Raises:
        CheckpointError: If the file cannot be read, does not fit the model, or holds weights that are not finite.
        MisconfigurationException: If config and checkpoint name different triggers.
        ValueError: If what the checkpoint says of its trigger is broken.
    """
    checkpoint = read_checkpoint(path)
    check_weights(model, checkpoint["state_dict"], path)
    manifest = use_manifest_of(checkpoint, path, datamodule, override=override_trigger)
    if manifest is None and not override_trigger and datamodule.poison is not None:
        rank_zero_info(
            f"{path} has no manifest, so its attack is not known. (`--override-trigger` takes the config's trigger.)"
        )
        datamodule.replace_poison(None)
    if manifest is None:
        use_trained_trigger_of(checkpoint, path, datamodule, override=override_trigger)
    model.load_state_dict(checkpoint["state_dict"])
    try:
        check_finite_weights(model, str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return manifest


def named_after(checkpoint: Path) -> str:
    """Name a folder after a checkpoint: its phase's for a run's ``final.ckpt``, else the file's.

    Args:
        checkpoint: Path of the checkpoint.
    """
    path = checkpoint.absolute()
    return path.parent.name if path.stem == "final" and path.parent.name else path.stem


def own_data(datamodule: LightningDataModule, phases: Mapping[str, Phase]) -> ImageDataModule:
    """Return the datamodule, if it is one that the commands can read poison, splits and test sets from.

    A trigger that is learnt from images will be learnt from those that the run of the phases learns it from.

    Args:
        datamodule: Any.
        phases: The config's phases.

    Raises:
        MisconfigurationException: If it is none.
    """
    if not isinstance(datamodule, ImageDataModule):
        raise MisconfigurationException(
            "This command needs one of lightning_bd.datamodules (or a subclass of ImageDataModule), but got "
            f"{type(datamodule).__name__}."
        )
    datamodule.learns_from = attackers_splits(phases)
    return datamodule
