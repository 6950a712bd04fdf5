"""The input-aware dynamic attack: a trigger of its own for each image, which works on no other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_bd.attacks.base import GeneratorAttack
from lightning_bd.attacks.generator_training import average_gradients
from lightning_bd.batch import AttackBatch
from lightning_bd.classifier import Normalization
from lightning_bd.triggers.input_aware import InputAwareTrigger
from lightning_bd.triggers.network import NetworkTrigger

__all__ = ("InputAware", "diversity_loss")

# The released code divides by a distance plus this. Here it is in the root too, whose gradient at 0 is infinite.
_EPSILON = 1e-7


def diversity_loss(images: Tensor, others: Tensor, outputs: Tensor, other_outputs: Tensor) -> Tensor:
    r"""Return how much more alike outputs are than the images that they are made for.

    :math:`\operatorname{mean} \lVert x - x' \rVert / (\lVert g(x) - g(x') \rVert + \epsilon)`, with root mean squares
    over channels and pixels, which is the published code's norm.

    Args:
        images: ``(B, C, H, W)``.
        others: ``(B, C, H, W)``, the images that they are compared with.
        outputs: ``(B, D, H, W)``, what was made for ``images``.
        other_outputs: ``(B, D, H, W)``, what was made for ``others``.

    Example:
        >>> black, white = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
        >>> diversity_loss(black, white, black[:, :1], 0.5 * white[:, :1])
        tensor(2.0000)
    """
    return (_distance(images, others) / (_distance(outputs, other_outputs) + _EPSILON)).mean()


class InputAware(GeneratorAttack[InputAwareTrigger]):
    r"""Train a classifier and a network that makes a trigger for each image, which is to work on that image only.

    The attack of `Nguyen and Tran, 2020 <https://arxiv.org/abs/2010.08138>`_ with
    :class:`~lightning_bd.triggers.InputAwareTrigger`. Before the first poisoned phase the mask's network is trained by
    itself, on clean images without labels: :math:`\lambda_{div}` times the diversity of the masks plus
    :math:`\lambda_{norm}` times the mean of what they exceed ``mask_density`` by. Then it stays, and the pattern's
    network is trained with the classifier on the loss of the batch, in which the poison's ``rate`` of the images have
    their trigger and ``cover_rate`` of them that of another image and their own label, plus :math:`\lambda_{div}` times
    the diversity of the patterns.

    Differs from the paper: the other image is the next one of the batch, not one of a second loader; the diversity is
    that of the triggered images and these. Learning rates of the networks are constant, and the gradient of the
    pattern's network is that of the step, which the released code sums over all steps.

    Args:
        backbone: Any module that maps images ``(B, C, H, W)`` in [0, 1] (after ``normalize``) to logits ``(B, K)``.
        num_classes: Number of classes ``K``.
        diversity: Weight of the diversity, at least 0; 1 in the paper.
        mask_density: Share of the pixels that a mask may cover without a cost, in [0, 1]; 0.032 in the released code.
        mask_norm: Weight of what it covers beyond, at least 0; 100 in the released code.
        mask_epochs: Epochs of the mask's training; 25 in the released code.
        generator_lr: Learning rate of both networks' Adam; 0.01 in the released code.
        generator_betas: Its decays; the released code's.
        optimizer: Makes the model's optimizer; a phase may bring its own.
        lr_scheduler: Makes its schedule.
        criterion: Loss of logits and labels; cross-entropy by default.
        normalize: Mean and standard deviation per channel.
        channels_last: Use the channels-last memory format.
        compile: Compile the backbone.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When a fit starts; see :class:`~lightning_bd.attacks.base.GeneratorAttack`.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> model = InputAware(small_cnn(num_classes=10, in_channels=1), num_classes=10, mask_epochs=5)
    """

    trigger_class: ClassVar[type[NetworkTrigger]] = InputAwareTrigger

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        diversity: float = 1.0,
        mask_density: float = 0.032,
        mask_norm: float = 100.0,
        mask_epochs: int = 25,
        generator_lr: float = 0.01,
        generator_betas: tuple[float, float] = (0.5, 0.9),
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lr_scheduler: LRSchedulerCallable | None = None,
        criterion: nn.Module | None = None,
        normalize: Normalization | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, generator_lr, generator_betas, optimizer, lr_scheduler, criterion, normalize,
            channels_last, compile,
        )  # fmt: skip
        for name, value in (("diversity", diversity), ("mask_norm", mask_norm)):
            if not value >= 0:
                raise ValueError(f"Expected argument `{name}` to be a non-negative float, but got {value}.")
        if not 0 <= mask_density <= 1:
            raise ValueError(f"Expected argument `mask_density` to be a share in [0, 1], but got {mask_density}.")
        if mask_epochs < 0:
            raise ValueError(f"Expected argument `mask_epochs` to be a non-negative integer, but got {mask_epochs}.")
        self.diversity = diversity
        self.mask_density = mask_density
        self.mask_norm = mask_norm
        self.mask_epochs = mask_epochs

    def trained_parameters(self, trigger: InputAwareTrigger) -> list[nn.Parameter]:
        """Return the parameters of the pattern's network.

        Args:
            trigger: The trigger.
        """
        return list(trigger.part("pattern").parameters())

    def attack_loss(self, batch: AttackBatch) -> Tensor:
        """Return the loss of the batch with its triggers and covers, plus the diversity of its patterns."""
        clean, rows, covers = batch.clean_image, batch.poison_rows, batch.cover_rows
        changed = torch.cat([rows, covers])
        if len(changed) == 0:
            plain: Tensor = self.criterion(self(clean), batch.label)
            return plain
        others = clean.roll(-1, dims=0)
        makers = torch.cat([clean[rows], others[covers]])
        diverse = len(rows) > 0 and self.diversity > 0
        patterns = self.trigger.pattern(torch.cat([makers, others[rows]]) if diverse else makers)
        put = self.trigger.put(clean[changed], makers, patterns[: len(changed)])
        loss: Tensor = self.criterion(self(clean.index_copy(0, changed, put)), batch.label)
        if diverse:
            own, other = patterns[: len(rows)], patterns[len(changed) :]
            diversity = diversity_loss(clean[rows], others[rows], own, other)
            self.log("train/diversity", diversity.detach(), batch_size=len(rows))
            loss = loss + self.diversity * diversity
        return loss

    def prepare_trigger(self, trigger: InputAwareTrigger) -> None:
        """Train the mask's network, unless an earlier phase has done so.

        Args:
            trigger: The trigger.
        """
        if self.mask_epochs == 0 or not trigger.has_initial_mask():
            return
        with _trained(trigger.part("mask")) as parameters:
            optimizer = self.generator_optimizer(parameters)
            shown = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
            for epoch in tqdm(range(self.mask_epochs), "training masks", disable=not shown, leave=False):
                self._train_masks(trigger, optimizer, parameters, epoch)

    def _train_masks(
        self, trigger: InputAwareTrigger, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], epoch: int
    ) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for batch in data.clean_batches("masks", epoch, self.device):
            optimizer.zero_grad()
            torch.autograd.backward(self.mask_loss(trigger, batch.image))
            average_gradients(self.trainer, parameters)
            optimizer.step()

    def mask_loss(self, trigger: InputAwareTrigger, images: Tensor) -> Tensor:
        """Return the loss that the mask's network is trained on.

        Args:
            trigger: The trigger.
            images: ``(B, C, H, W)``, clean.
        """
        masks = trigger.mask(images)
        excess = (masks - self.mask_density).relu().mean()
        diversity = diversity_loss(images, images.roll(-1, dims=0), masks, masks.roll(-1, dims=0))
        return self.mask_norm * excess + self.diversity * diversity


@contextmanager
def _trained(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let a network be trained inside the block, and freeze it again."""
    parameters = list(module.parameters())
    required = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, before in zip(parameters, required, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other).square().mean(dim=(1, 2, 3)) + _EPSILON**2).sqrt()
