"""What every defense gets, does and reports."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_bd.functional.evaluation import check_finite_weights

__all__ = ("DefenderData", "Defense", "NotApplicableError", "Report")

Pairs = Iterator[tuple[Tensor, Tensor]]


class NotApplicableError(Exception):
    """A defense cannot work on this model or data; the message says why, and the model was not changed."""


@dataclass(frozen=True)
class DefenderData:
    """All that a defense may use: a little clean data.

    Attributes:
        train: Given the number of an epoch, yields its ``(image, label)`` batches on the model's device.
        validation: Yields the held-out ``(image, label)`` batches; what a defense may select on.
        num_classes: Number of classes.
        epoch_limit: The run's cap on epochs, ``None`` for none.
        forward_context: Makes the context of each single forward pass, for mixed precision. Not of more: autocast
            keeps its copies of the weights until the block ends, so that steps inside it would not be seen.
        show_progress: Whether to show progress bars.
    """

    train: Callable[[int], Pairs]
    validation: Callable[[], Pairs]
    num_classes: int
    epoch_limit: int | None = None
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext
    show_progress: bool = False


@dataclass
class Report:
    """What a defense did.

    Attributes:
        epochs: Epochs over the defender's training data that the purified model saw.
        values: Named numbers, such as the chosen learning rate.
        note: One sentence for the results table; empty if there is nothing to say.
        images: Named pictures ``(C, H, W)`` in [0, 1], such as inverted triggers; written as PNG files.
        tensors: What :meth:`Defense.stages` needs to repeat the work, such as the order of pruning.
    """

    epochs: int = 0
    values: dict[str, float] = field(default_factory=dict)
    note: str = ""
    images: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class _Defendable(Protocol):
    """The datamodule of a defending phase."""

    num_classes: int
    epoch_limit: int | None

    def batches(self, part: str, device: torch.device | str = "cpu", epoch: int = 0) -> Pairs: ...


class Defense(Callback, ABC):
    """Base of the defenses that change a model's weights before, or instead of, training.

    Runs :meth:`purify` when a fit starts. With ``max_epochs: 0`` that is the whole defense. Every process computes
    the same; the first one's weights are then sent to the others. Attack success is no input and never measured here.
    """

    #: What the positions that :meth:`stages` yields are, for the axis of a figure.
    stage_axis: ClassVar[str] = "stage"

    def __init__(self) -> None:
        self.report: Report | None = None

    @abstractmethod
    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Change ``model`` in place.

        Args:
            model: Maps images ``(B, C, H, W)`` in [0, 1] to logits; comes and leaves in the mode it was in.
            data: The defender's clean data.

        Returns:
            What was done.

        Raises:
            NotApplicableError: If the model or the data lacks what the defense needs; ``model`` is as it was.
        """

    def stages(self, model: nn.Module, report: Report) -> Iterator[float]:
        """Take a copy of the attacked model step by step through what :meth:`purify` did to it.

        For whoever draws accuracy and attack success along the way *afterwards*; a defense never does. Most defenses
        have no such steps and yield nothing.

        Args:
            model: A copy of the model as it was before the defense; changed in place before each position.
            report: What :meth:`purify` returned.

        Yields:
            The position of the model in its present state, on the axis :attr:`stage_axis`.
        """
        return iter(())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the report of an earlier fit; that of a resumed one is loaded after this."""
        if stage == "fit":
            self.report = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Purify the model, unless a checkpoint says that this was done before."""
        if self.report is not None:
            return
        try:
            check_finite_weights(pl_module)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        view = getattr(trainer, "datamodule", None)
        if not isinstance(view, _Defendable):
            raise MisconfigurationException(
                f"{type(self).__name__} works on a DefenderView, the clean split that a defending phase gets: fit with "
                "`datamodule=DefenderView(...)`, or call `purify(model, DefenderData(...))` yourself."
            )
        if trainer.precision == "16-mixed":
            raise MisconfigurationException(
                f"{type(self).__name__} trains without a GradScaler, so `precision` 16-mixed would lose its gradients. "
                "Use bf16-mixed or 32-true."
            )
        device = trainer.strategy.root_device
        data = DefenderData(
            train=lambda epoch: view.batches("train", device, epoch),
            validation=lambda: view.batches("validation", device),
            num_classes=view.num_classes,
            # Lightning's -1 is no limit.
            epoch_limit=None if view.epoch_limit is None or view.epoch_limit < 0 else view.epoch_limit,
            forward_context=trainer.precision_plugin.forward_context,
            show_progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
        )
        self.report = self.purify(pl_module, data)
        if trainer.world_size > 1:
            for tensor in pl_module.state_dict().values():
                tensor.copy_(trainer.strategy.broadcast(tensor))

    def state_dict(self) -> dict[str, Any]:
        """Return the report, so that a resumed fit does not purify twice."""
        if self.report is None:
            return {}
        return {"report": {item.name: getattr(self.report, item.name) for item in fields(self.report)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the report."""
        self.report = Report(**state_dict["report"]) if state_dict else None
