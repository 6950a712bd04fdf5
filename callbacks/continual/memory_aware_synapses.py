"""Memory aware synapses in any automatically optimised LightningModule."""

from collections.abc import Iterable
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_bd.callbacks.continual.importance import accumulate, check_measurement, mean_over_reference
from lightning_bd.callbacks.continual.quadratic_regularizer import QuadraticRegularizer
from lightning_bd.callbacks.continual.reference import ReferenceKind
from lightning_bd.functional.memory_aware import memory_aware_sums

__all__ = ("MemoryAwareSynapses",)


class MemoryAwareSynapses(QuadraticRegularizer):
    r"""Hold the weights to which the model's output is sensitive where they are at the start of the fit.

    At the start of the fit the weights are stored as :math:`\theta^*` and :math:`\Omega_i`, the mean over samples of
    :math:`|\partial \lVert f(x) \rVert_2^2 / \partial \theta_i|`, is measured on images of the previous task, without
    labels. From then on the loss is that of ``training_step`` plus
    :math:`\lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2` (`Aljundi et al., 2018
    <https://arxiv.org/abs/1711.09601>`_). Absolute values are taken for each sample, as the paper's equation says; the
    gradient of a batch's mean, faster and common in code, lets signs cancel.

    The penalty's gradient is added after each backward pass, as if the penalty were part of the loss: it is scaled by
    the GradScaler, accumulated, clipped, and counted in both passes of
    :class:`~lightning_bd.callbacks.SharpnessAwareMinimization`. ``mas/penalty`` and ``mas/share``, the penalty's part
    of loss plus penalty, are logged every ``log_every_n_steps`` steps. A checkpoint holds :math:`\Omega` and
    :math:`\theta^*`, and a resumed fit goes on with them.

    The module's ``forward`` maps images to logits. The measurement runs it in evaluation mode, leaves no trace in it
    and does not advance the global random state.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is a plain fit, and nothing is measured. The stable range depends on
            the size of :math:`\Omega`, which grows with that of the logits, so look at ``mas/share``; a warning tells
            when a gradient step would overshoot.
        num_samples: Samples to measure on, positive, all processes together; None takes all.
        dataloader: Batches of the previous task; ``batch[0]`` are images. They pass through the module's
            ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer``, and are pairs
            after that. Under DDP each process reads its own loader; give it a ``DistributedSampler`` to share the
            work. None: ``trainer.datamodule.reference_batches(device)``, which yields batches on the device, each
            process its part.
        reference: Which of the datamodule's batches: ``"as_trained"``, triggers included, or ``"clean"``, the same
            images without them. A ``dataloader`` is taken as it is.
        gamma: The importance is that of the previous task plus ``gamma`` times what the last finished fit held, in
            [0, 1]; 1 adds up the importance of all tasks. None forgets earlier fits. The same object fitted several
            times adds up by itself; see ``carry_over`` for another one.
        chunk_size: Samples whose gradients are formed together, positive. None: 32 on a CPU, 128 elsewhere.
        max_memory: Bytes that the per-sample gradients may take together, positive. None: 16 MiB on a CPU, 512 MiB
            elsewhere.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS, a strategy other than single
            device and DDP, without data, with an importance that is not finite, or with that of another model.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> old_task = [(torch.rand(4, 3, 8, 8), torch.zeros(4))]
        >>> trainer = Trainer(callbacks=[MemoryAwareSynapses(strength=0.1, dataloader=old_task)], logger=False)
    """

    log_prefix: ClassVar[str] = "mas"

    def __init__(
        self,
        strength: float = 1.0,
        num_samples: int | None = None,
        dataloader: Iterable[Any] | None = None,
        reference: ReferenceKind = "as_trained",
        gamma: float | None = None,
        chunk_size: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        super().__init__(strength)
        check_measurement(num_samples, chunk_size, max_memory, gamma, reference)
        self.num_samples = num_samples
        self.dataloader = dataloader
        self.reference: ReferenceKind = reference
        self.gamma = gamma
        self.chunk_size = chunk_size
        self.max_memory = max_memory

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        if self.strength == 0:
            return {}
        earlier = {} if self.gamma is None else self._carried_for(pl_module)

        def sums(batches: Iterable[Any], num_samples: int | None) -> tuple[dict[str, Tensor], int]:
            return memory_aware_sums(
                pl_module,
                batches,
                num_samples=num_samples,
                chunk_size=self.chunk_size,
                max_memory=self.max_memory,
            )

        importance = mean_over_reference(
            trainer,
            pl_module,
            sums,
            name=type(self).__name__,
            noun=self.noun,
            num_samples=self.num_samples,
            dataloader=self.dataloader,
            reference=self.reference,
        )
        return importance if self.gamma is None else accumulate(importance, earlier, self.gamma)
