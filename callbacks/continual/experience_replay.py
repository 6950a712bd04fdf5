"""Experience replay in any automatically optimised LightningModule."""

from collections.abc import Iterable
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_bd.callbacks.continual.reference import ReferenceKind, check_reference
from lightning_bd.callbacks.continual.replay_buffer import (
    BufferBatch,
    ReplayBuffer,
    filled_buffer,
    from_all_processes,
)
from lightning_bd.callbacks.loss_term import LossTerm
from lightning_bd.functional.draws import keyed_generator

__all__ = ("ExperienceReplay",)


class ExperienceReplay(LossTerm):
    r"""Train on remembered samples of the previous task beside those of the new one.

    At the start of the fit a buffer is filled with samples of the previous task. The loss of each batch gains
    ``strength`` times the mean cross-entropy of a batch that is drawn from it (`Chaudhry et al., 2019
    <https://arxiv.org/abs/1902.10486>`_, after `Rolnick et al., 2019 <https://arxiv.org/abs/1811.11682>`_; differs
    from both in that there is one previous task, whose samples are offered at once, and not as they are trained on).

    The module's ``forward`` maps images to logits. It runs on the buffer's batch as it does on the new one, in the
    mode that the module trains in, so that the running statistics of BatchNorm follow both. Samples of the buffer are
    not augmented again. A step costs one more forward and backward pass over ``batch_size`` samples.

    Logged are ``experience_replay/penalty``, the term times ``strength``, and ``experience_replay/share``, its part of
    loss plus penalty. A checkpoint holds the buffer, and a resumed fit goes on with it. Under DDP all processes hold
    the same buffer and draw batches of their own.

    Args:
        strength: Factor of the term, at least 0; 1 in the papers. 0 is a plain fit, and nothing is buffered.
        capacity: Samples in the buffer, positive.
        batch_size: Samples of the buffer per batch and process, positive; the whole buffer if it holds fewer. In the
            papers as many as there are new ones.
        dataloader: Batches of the previous task; ``batch[0]`` are images in [0, 1], ``batch[1]`` labels. They pass
            through the module's batch transfer hooks. Under DDP each process reads its own loader; give it a
            ``DistributedSampler``, for else the buffer fills with duplicates. None:
            ``trainer.datamodule.reference_batches(device)``, which yields each process its part.
        reference: Which batches the datamodule replays: ``"as_trained"``, triggers included, or ``"clean"``, the same
            images without them.
        insert_current: Whether the new task's samples, too, are offered to the buffer after they were trained on, as in
            the papers' stream of tasks. The default holds the previous task alone: the new samples are in the loss
            anyway, and each that enters takes the place of one that may carry the backdoor. Under DDP the batches are
            then exchanged between the processes.
        seed: Seed of the buffer and of the batches that are drawn from it.

    Raises:
        ValueError: If an argument is out of range; when the fit starts, if the images are not in [0, 1].
        MisconfigurationException: When the fit starts, without data, and in the situations of
            :class:`~lightning_bd.callbacks.loss_term.LossTerm`.

    Example:
        >>> import torch
        >>> old_task = [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))]
        >>> trainer = Trainer(callbacks=[ExperienceReplay(dataloader=old_task)], logger=False)
    """

    log_name: ClassVar[str] = "experience_replay"

    def __init__(
        self,
        strength: float = 1.0,
        capacity: int = 512,
        batch_size: int = 256,
        dataloader: Iterable[Any] | None = None,
        reference: ReferenceKind = "as_trained",
        insert_current: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(strength)
        for name, value in (("capacity", capacity), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        check_reference(reference)
        self.capacity = capacity
        self.batch_size = batch_size
        self.dataloader = dataloader
        self.reference: ReferenceKind = reference
        self.insert_current = insert_current
        self.seed = seed
        self._buffer = ReplayBuffer(capacity, seed)
        # Number of the batch within the optimizer step; SAM's second pass counts again from 0.
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Save the buffer."""
        return {"buffer": self._buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the buffer from a checkpoint."""
        self._buffer.load_state_dict(state_dict["buffer"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsupported fit and forget the last one; the state of a resumed one is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._buffer = ReplayBuffer(self.capacity, self.seed)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the buffer, unless a checkpoint held it."""
        super().on_fit_start(trainer, pl_module)
        if self.strength == 0:
            return
        if self._buffer.seen == 0:
            self._buffer = filled_buffer(
                trainer,
                pl_module,
                type(self).__name__,
                dataloader=self.dataloader,
                reference=self.reference,
                capacity=self.capacity,
                seed=self.seed,
                logits=lambda images: self.logits_to_store(trainer, pl_module, images),
            )
        self._buffer.to(pl_module.device)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note that an optimizer step begins."""
        self._position = 0

    def on_replay_batch_start(self, batch: object) -> None:
        """Go back to the draws of the step's first batch: both passes of SAM see the same samples."""
        if not self._replayed:
            self._position = 0
        super().on_replay_batch_start(batch)

    def compute(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> Tensor:
        """Return the term on a batch of the buffer, whatever the current batch is."""
        key = ("experience_replay", trainer.global_step, self._position, trainer.global_rank)
        self._position += 1
        drawn = self._buffer.sample(self.batch_size, keyed_generator(self.seed, *key))
        logits: Tensor = pl_module(trainer.precision_plugin.convert_input(drawn.images))
        return self.term(logits, drawn)

    def term(self, logits: Tensor, drawn: BufferBatch) -> Tensor:
        """Return the term of a batch of the buffer, without ``strength``.

        Args:
            logits: The model's ``(B, K)`` for its images, with their graph.
            drawn: The batch.
        """
        return F.cross_entropy(logits, drawn.labels)

    def logits_to_store(self, trainer: Trainer, pl_module: LightningModule, images: Tensor) -> Tensor | None:
        """Return the logits that are remembered with ``images``: none."""
        return None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log the term, and offer the batch to the buffer with ``insert_current``."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.strength == 0 or not self.insert_current:
            return
        images = self.images(batch)
        labels: Tensor = batch[1]  # type: ignore[index]
        logits = self.logits_to_store(trainer, pl_module, images)
        if trainer.world_size > 1:
            images, labels, logits = images.cpu(), labels.cpu(), None if logits is None else logits.cpu()
        # The buffer must stay the same everywhere, for the checkpoint holds that of the first process.
        for part in from_all_processes(trainer, BufferBatch(images, labels, logits)):
            self._buffer.insert(*part)
