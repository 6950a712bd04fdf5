"""Dark experience replay in any automatically optimised LightningModule."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay
from lightning_bd.callbacks.continual.reference import ReferenceKind
from lightning_bd.callbacks.continual.replay_buffer import BufferBatch
from lightning_bd.functional.modes import mode

__all__ = ("DarkExperienceReplay",)


class DarkExperienceReplay(ExperienceReplay):
    r"""Hold the logits of remembered samples where they were, and train on their labels.

    At the start of the fit a buffer is filled with samples :math:`x` of the previous task, their labels :math:`y` and
    the logits :math:`z` that the model has for them then. The loss of each batch gains, on a batch drawn from the
    buffer, :math:`\alpha \, \mathrm{mean} (f(x) - z)^2 + \beta \, \mathrm{CE}(f(x), y)` (DER++, and DER with
    ``beta=0``; `Buzzega et al., 2020 <https://arxiv.org/abs/2004.07211>`_). The mean is over samples and classes, as
    in the authors' code; the paper writes the sum over the classes. Differs from the paper in that one batch serves
    both terms, which saves a forward and a backward pass, that the logits are those of one model, the one that comes
    into the fit, in evaluation mode, and as :class:`~lightning_bd.callbacks.continual.ExperienceReplay` does.

    All else is as there. Logged are ``dark_experience_replay/penalty``, both terms with their factors, and
    ``dark_experience_replay/share``, their part of loss plus penalty.

    Args:
        alpha: Factor of the squared distance of the logits, at least 0; 0.2 in the authors' code for CIFAR-10 and a
            buffer of 500.
        beta: Factor of the cross-entropy, at least 0; 0.5 there. With both 0 the fit is a plain one, and nothing is
            buffered.
        capacity: Samples in the buffer, positive.
        batch_size: Samples of the buffer per batch and process, positive; the whole buffer if it holds fewer. In the
            paper as many as there are new ones.
        dataloader: Batches of the previous task; ``batch[0]`` are images in [0, 1], ``batch[1]`` labels. They pass
            through the module's batch transfer hooks. Under DDP each process reads its own loader; give it a
            ``DistributedSampler``, for else the buffer fills with duplicates. None:
            ``trainer.datamodule.reference_batches(device)``, which yields each process its part.
        reference: Which batches the datamodule replays: ``"as_trained"``, triggers included, or ``"clean"``, the same
            images without them.
        insert_current: Whether the new task's samples, too, are offered to the buffer after they were trained on, as in
            the paper's stream, with the logits that the model has for them then; it costs one forward pass more. The
            default holds the previous task alone.
        seed: Seed of the buffer and of the batches that are drawn from it.

    Raises:
        ValueError: If an argument is out of range; when the fit starts, if the images are not in [0, 1].
        MisconfigurationException: When the fit starts, without data, and in the situations of
            :class:`~lightning_bd.callbacks.loss_term.LossTerm`.

    Example:
        >>> old_task = [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))]
        >>> trainer = Trainer(callbacks=[DarkExperienceReplay(alpha=0.2, dataloader=old_task)], logger=False)
    """

    log_name: ClassVar[str] = "dark_experience_replay"

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.5,
        capacity: int = 512,
        batch_size: int = 256,
        dataloader: Iterable[Any] | None = None,
        reference: ReferenceKind = "as_trained",
        insert_current: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Expected argument `{name}` to be a non-negative float, but got {value}.")
        # Both factors are within the term.
        strength = 1.0 if alpha > 0 or beta > 0 else 0.0
        super().__init__(strength, capacity, batch_size, dataloader, reference, insert_current, seed)
        self.alpha = float(alpha)
        self.beta = float(beta)

    def term(self, logits: Tensor, drawn: BufferBatch) -> Tensor:
        """Return the sum of both terms with their factors.

        Args:
            logits: The model's ``(B, K)`` for the images of the batch, with their graph.
            drawn: The batch.
        """
        assert drawn.logits is not None
        total = logits.new_zeros((), dtype=torch.float32)
        if self.alpha > 0:
            total = total + self.alpha * F.mse_loss(logits.float(), drawn.logits)
        if self.beta > 0:
            total = total + self.beta * F.cross_entropy(logits, drawn.labels)
        return total

    def logits_to_store(self, trainer: Trainer, pl_module: LightningModule, images: Tensor) -> Tensor:
        """Return the logits that the model has for ``images`` now, in evaluation mode."""
        with torch.no_grad(), mode(pl_module, training=False), trainer.precision_plugin.forward_context():
            logits: Tensor = pl_module(images)
        return logits
