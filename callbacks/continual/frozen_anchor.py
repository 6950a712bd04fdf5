"""Base of the loss terms that hold a model's outputs to those of its former self."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_bd.callbacks.isolation import copy_tensors
from lightning_bd.callbacks.loss_term import LossTerm
from lightning_bd.functional.modes import mode
from lightning_bd.functional.replaced import call_with

__all__ = ("AnchoredLossTerm",)


class AnchoredLossTerm(LossTerm):
    """Compare the logits of each batch with those that the model gave at the start of the fit.

    At the start of the fit parameters and buffers are copied. For each batch the module is called once with these
    copies in place of its own tensors, in evaluation mode and without a graph: one forward pass, and the gradient
    reaches the current weights only. The copies are in every checkpoint, which grows by the size of the model, and
    a resumed fit goes on with them.

    Args:
        strength: Factor of the term, at least 0. With 0 nothing is copied.

    Raises:
        ValueError: If ``strength`` is out of range.
        MisconfigurationException: When the fit starts, in the situations of
            :class:`~lightning_bd.callbacks.loss_term.LossTerm`, or with the anchor of another model.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self._anchor: dict[str, Tensor] = {}

    @abstractmethod
    def distance(self, logits: Tensor, anchor_logits: Tensor, batch: object) -> Tensor:
        """Return the term of one batch, without ``strength``.

        Args:
            logits: The model's, ``(B, K)``, with their graph.
            anchor_logits: Those of the model at the start of the fit, ``(B, K)``, without a graph.
            batch: What ``training_step`` got.

        Returns:
            A tensor without dimensions.
        """

    def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
        """Return the distance of the batch's logits from the anchor's."""
        logits = self.logits(pl_module, batch)
        with mode(pl_module, training=False), torch.no_grad():
            anchor_logits = call_with(pl_module, self._anchor, self.images(batch))
        return self.distance(logits, anchor_logits, batch)

    def state_dict(self) -> dict[str, Any]:
        """Save the anchor's parameters and buffers."""
        return {"anchor": dict(self._anchor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the anchor's parameters and buffers from a checkpoint."""
        self._anchor = dict(state_dict["anchor"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported fit and forget the last one; the state of a resumed one is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._anchor = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the model, unless a checkpoint held the copy."""
        super().on_fit_start(trainer, pl_module)
        if self.strength == 0:
            return
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        if not self._anchor:
            self._anchor = dict(zip(tensors, copy_tensors(list(tensors.values())), strict=True))
        # Nothing may be missing: the anchor would use the present tensor.
        other = sorted(tensors.keys() ^ self._anchor.keys())
        if other:
            raise MisconfigurationException(
                f"`{type(self).__name__}` resumes with the anchor of another model: {other[0]!r} is in one of them"
                " only. Resume with the model that the checkpoint was saved with."
            )
        self._anchor = {name: tensor.to(pl_module.device) for name, tensor in self._anchor.items()}
