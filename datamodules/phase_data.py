"""What one phase trains on."""

from dataclasses import dataclass

from lightning_bd.batch import PoisonMode

__all__ = ("PhaseData",)


@dataclass(frozen=True)
class PhaseData:
    """What one phase trains on.

    Args:
        name: Name of the phase; part of the key of every draw.
        splits: Names of the splits, joined; empty for the whole training set.
        poison: How images are poisoned, ``None`` for a clean phase.
        batch_size: Images per batch and process; ``None`` for the datamodule's.
    """

    name: str = "fit"
    splits: tuple[str, ...] = ()
    poison: PoisonMode | None = None
    batch_size: int | None = None
