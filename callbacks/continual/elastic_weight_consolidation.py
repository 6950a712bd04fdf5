"""Elastic weight consolidation in any automatically optimised LightningModule."""

from collections.abc import Iterable
from typing import Any, ClassVar, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_bd.callbacks.continual.importance import accumulate, check_measurement, mean_over_reference
from lightning_bd.callbacks.continual.quadratic_regularizer import QuadraticRegularizer
from lightning_bd.callbacks.continual.reference import ReferenceKind
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.fisher import FisherKind, fisher_sums

__all__ = ("ElasticWeightConsolidation",)


class ElasticWeightConsolidation(QuadraticRegularizer):
    r"""Hold the weights that the previous task needs where they are at the start of the fit.

    At the start of the fit the weights are stored as :math:`\theta^*` and the diagonal :math:`F` of the Fisher
    information is measured on data of the previous task. From then on the loss is that of ``training_step`` plus
    :math:`\lambda \sum_i F_i (\theta_i - \theta^*_i)^2` (`Kirkpatrick et al., 2017
    <https://arxiv.org/abs/1612.00796>`_; differs from the paper in that there is no factor 1/2). Every parameter that
    requires a gradient at the start of the fit is held.

    The penalty's gradient is added after each backward pass, as if the penalty were part of the loss: it is scaled by
    the GradScaler, accumulated, clipped, and counted in both passes of
    :class:`~lightning_bd.callbacks.SharpnessAwareMinimization`. The loss that ``training_step`` returns and logs does
    not hold it. ``ewc/penalty`` and ``ewc/share``, the penalty's part of loss plus penalty, are logged every
    ``log_every_n_steps`` steps. A checkpoint holds :math:`F` and :math:`\theta^*`, and a resumed fit goes on with them.

    With ``gamma`` it is online EWC, for any number of tasks (Schwarz et al., 2018, `Progress & Compress
    <https://arxiv.org/abs/1805.06370>`_): :math:`F \leftarrow \gamma F_{\text{old}} + F_{\text{new}}`, where
    :math:`F_{\text{old}}` is what the last finished fit held, and :math:`\theta^*` moves to the weights at the start of
    each fit. The same object fitted several times does so by itself; see ``carry_over`` for another one.

    The module's ``forward`` maps images to logits. The Fisher pass runs it in evaluation mode, leaves no trace in it
    and does not advance the global random state.

    Args:
        strength: :math:`\lambda`, at least 0; 0 is a plain fit, and nothing is measured. The stable range depends on
            the size of :math:`F`, so look at ``ewc/share``; a warning tells when a gradient step would overshoot.
        fisher: How :math:`F` is measured: with the labels of the data (``"empirical"``), over the model's own labels
            (``"exact"``, one backward pass for each class), with one label drawn from them (``"sampled"``), or as the
            code of `Flatness-aware Sequential Learning <https://arxiv.org/abs/2407.14738>`_ does (``"weighted"``). See
            :func:`~lightning_bd.functional.fisher.fisher_diagonal`.
        num_samples: Samples to measure on, positive, all processes together; None takes all.
        dataloader: Batches of the previous task; ``batch[0]`` are images, ``batch[1]`` labels. They pass through the
            module's ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer``. Under
            DDP each process reads its own loader; give it a ``DistributedSampler`` to share the work. None:
            ``trainer.datamodule.reference_batches(device)``, which yields batches on the device, each process its part.
        chunk_size: Samples that are propagated together in the measurement, positive. None: 32 on a CPU, 128 elsewhere.
        max_memory: Bytes that the per-sample gradients of one layer may take, positive. None: 16 MiB on a CPU,
            512 MiB elsewhere.
        seed: Seed of the labels that ``"sampled"`` draws.
        gamma: :math:`\gamma`, in [0, 1]; slightly below 1 in the paper. None forgets earlier fits.
        reference: Which of the datamodule's batches: ``"as_trained"``, triggers included, or ``"clean"``, the same
            images without them, as the code of Flatness-aware Sequential Learning measures. A ``dataloader`` is taken
            as it is.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When the fit starts, with manual optimization, LBFGS, a strategy other than single
            device and DDP, without data, with a Fisher information that is not finite, or with that of another model.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> old_task = [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))]
        >>> trainer = Trainer(callbacks=[ElasticWeightConsolidation(strength=10.0, dataloader=old_task)], logger=False)
    """

    log_prefix: ClassVar[str] = "ewc"
    noun: ClassVar[str] = "Fisher information"
    symbol: ClassVar[str] = "F"
    importance_key: ClassVar[str] = "fisher"

    def __init__(
        self,
        strength: float = 1.0,
        fisher: FisherKind = "empirical",
        num_samples: int | None = None,
        dataloader: Iterable[Any] | None = None,
        chunk_size: int | None = None,
        max_memory: int | None = None,
        seed: int = 0,
        gamma: float | None = None,
        reference: ReferenceKind = "as_trained",
    ) -> None:
        super().__init__(strength)
        if fisher not in get_args(FisherKind):
            raise ValueError(f"Expected argument `fisher` to be one of {get_args(FisherKind)}, but got {fisher!r}.")
        check_measurement(num_samples, chunk_size, max_memory, gamma, reference)
        self.fisher: FisherKind = fisher
        self.num_samples = num_samples
        self.dataloader = dataloader
        self.chunk_size = chunk_size
        self.max_memory = max_memory
        self.seed = seed
        self.gamma = gamma
        self.reference: ReferenceKind = reference

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        if self.strength == 0:
            return {}
        earlier = {} if self.gamma is None else self._carried_for(pl_module)

        def sums(batches: Iterable[Any], num_samples: int | None) -> tuple[dict[str, Tensor], int]:
            return fisher_sums(
                pl_module,
                batches,
                self.fisher,
                num_samples=num_samples,
                chunk_size=self.chunk_size,
                max_memory=self.max_memory,
                generator=keyed_generator(self.seed, "fisher", trainer.global_rank),
            )

        fisher = mean_over_reference(
            trainer,
            pl_module,
            sums,
            name=type(self).__name__,
            noun=self.noun,
            num_samples=self.num_samples,
            dataloader=self.dataloader,
            reference=self.reference,
        )
        return fisher if self.gamma is None else accumulate(fisher, earlier, self.gamma)
