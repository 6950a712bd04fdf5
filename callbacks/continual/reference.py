"""Data of the previous task, for callbacks that measure or replay it."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

__all__ = ("ReferenceKind", "check_reference", "reference_batches")

#: ``"as_trained"``: the previous task's batches as its model saw them, triggers included. ``"clean"``: the same images
#: without the attacker's changes, as the code of https://arxiv.org/abs/2407.14738 measures and buffers them.
ReferenceKind = Literal["as_trained", "clean"]


def check_reference(reference: str) -> None:
    """Raise ``ValueError`` if ``reference`` is not a :data:`ReferenceKind`."""
    if reference not in get_args(ReferenceKind):
        raise ValueError(
            f"Expected argument `reference` to be one of {get_args(ReferenceKind)}, but got {reference!r}."
        )


def reference_batches(
    trainer: Trainer,
    pl_module: LightningModule,
    dataloader: Iterable[Any] | None,
    name: str,
    reference: ReferenceKind = "as_trained",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(images, labels)`` batches of the previous task on the module's device and in its precision.

    Args:
        trainer: The trainer that is fitting.
        pl_module: The module that is fitted.
        dataloader: Batches of the previous task, ``batch[0]`` images and ``batch[1]`` labels. They pass through the
            module's batch transfer hooks. ``None``: ``trainer.datamodule.reference_batches(device)``.
        name: Which callback wants them, for messages.
        reference: Which of the datamodule's batches; a ``dataloader`` is taken as it is.

    Raises:
        MisconfigurationException: If there is neither a ``dataloader`` nor such a datamodule.
    """
    if dataloader is not None:
        batches: Iterable[Any] = _transfer(dataloader, pl_module)
    else:
        make = getattr(getattr(trainer, "datamodule", None), "reference_batches", None)
        if make is None:
            raise MisconfigurationException(
                f"`{name}` needs data of the previous task. Pass `dataloader=...`, or fit with a datamodule that has"
                " `reference_batches(device)`."
            )
        batches = make(pl_module.device, clean=True) if reference == "clean" else make(pl_module.device)
    convert = trainer.precision_plugin.convert_input
    return ((convert(batch[0]), batch[1]) for batch in batches)


def _transfer(batches: Iterable[Any], pl_module: LightningModule) -> Iterator[Any]:
    for batch in batches:
        prepared = pl_module.on_before_batch_transfer(batch, 0)
        moved = pl_module.transfer_batch_to_device(prepared, pl_module.device, 0)
        yield pl_module.on_after_batch_transfer(moved, 0)
