"""Narcissus: a small change that points into the target class, and poisons without a wrong label."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lightning_bd.description import Description, describe
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.selection.labelled_folder import LabelledFolder
from lightning_bd.selection.surrogate import Surrogate
from lightning_bd.triggers.base import TensorSpec
from lightning_bd.triggers.learned import LearnedTrigger

__all__ = ("Narcissus",)


class Narcissus(LearnedTrigger):
    """Add one perturbation that makes every image look more like the target class to a model of the attacker's.

    The clean-label trigger of `Zeng et al., 2023 <https://arxiv.org/abs/2204.05255>`_. The attacker has the images of
    the target class and labelled ones of anything else. A surrogate learns to tell all of these classes apart; then
    one perturbation within ``epsilon`` is found that lowers the surrogate's loss on the target class's images further.
    A victim that sees it on such images takes it for a feature of the class. Training images get
    ``clamp(x + perturbation)``, attacked ones ``clamp(x + amplification * perturbation)``.

    Differs from the released code: no warm-up of the surrogate on the target class alone (5 rounds there); Adam in
    place of RAdam; after each step the perturbation is clamped to the budget, there only where it is used; images are
    not augmented.

    Args:
        epsilon: Largest change of a pixel in training, in (0, 1]; 16/255 in the paper.
        amplification: Factor of the perturbation in the attack, at least 0; 3 in the paper.
        surrogate: How the model is trained; ``None`` for the defaults of
            :class:`~lightning_bd.selection.surrogate.Surrogate`. The release trains a ResNet-18 for 200 epochs at
            ``lr`` 0.1.
        ood: Folder with one sub-folder of images per class, at least two, as for
            :class:`~lightning_bd.selection.ood_loss.OODLoss`; needed to learn, not to use a learnt trigger. The
            release: Tiny ImageNet.
        max_images: Use at most this many images per class of ``ood``; ``None``: all.
        steps: Batches of target images that the perturbation is changed by; the release goes through them 1000 times.
        lr: Largest change of a pixel in one step, about; 0.005 in the release.
        batch_size: Images per step.

    Raises:
        ValueError: If an argument is out of its range; when learnt, if there is no ``ood`` or target class, or no
            image of that class, if a folder cannot be used, or the images have neither 1 nor 3 channels.
        FileNotFoundError: When learnt, if there is no such folder.

    Example:
        >>> trigger = Narcissus(epsilon=0.1, amplification=3.0)
        >>> trigger.restore((1, 1, 2), {"perturbation": torch.tensor([[[0.1, -0.05]]])})
        >>> grey = torch.full((1, 1, 1, 2), 0.5)
        >>> trigger(grey), trigger.attack(grey)
        (tensor([[[[0.6000, 0.4500]]]]), tensor([[[[0.8000, 0.3500]]]]))
    """

    only_for_learning: ClassVar[tuple[str, ...]] = ("surrogate", "ood", "max_images", "steps", "lr", "batch_size")

    perturbation: Tensor

    def __init__(
        self,
        epsilon: float = 16 / 255,
        amplification: float = 3.0,
        surrogate: Surrogate | None = None,
        ood: str | Path | None = None,
        max_images: int | None = None,
        steps: int = 1000,
        lr: float = 0.005,
        batch_size: int = 128,
    ) -> None:
        super().__init__()
        if not 0 < epsilon <= 1:
            raise ValueError(f"Expected argument `epsilon` to be a float in (0, 1], but got {epsilon}.")
        if not 0 <= amplification < float("inf"):
            raise ValueError(f"Expected argument `amplification` to be a non-negative float, but got {amplification}.")
        if not 0 < lr < float("inf"):
            raise ValueError(f"Expected argument `lr` to be a positive float, but got {lr}.")
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        self.epsilon = epsilon
        self.amplification = amplification
        self.surrogate = surrogate if surrogate is not None else Surrogate()
        self.ood = None if ood is None else Path(ood)
        self.max_images = max_images
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size
        self._others = None if ood is None else LabelledFolder(ood, max_images, self.surrogate.seed)

    def attack(self, images: Tensor) -> Tensor:
        """Add the amplified perturbation to every image of a batch.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        self._prepare(images)
        return torch.add(images, self.perturbation.to(images), alpha=self.amplification).clamp_(0, 1)

    def identity(self) -> Description:
        """Describe the arguments, and the other data by their content instead of by where they lie."""
        described = describe(self)
        assert isinstance(described, dict)
        # What is learnt does not depend on how strongly it is used.
        learning = {name: value for name, value in described.items() if name not in ("ood", "amplification")}
        return {**learning, "ood_sha256": self._other_data().sha256()}

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        # The budget as float32 may lie above the argument.
        budget = float(torch.tensor(self.epsilon, dtype=torch.float32))
        return {"perturbation": TensorSpec(image_shape, -budget, budget)}

    def _learn(self, images: Tensor, labels: Tensor, target: int | None) -> dict[str, Tensor]:
        if target is None:
            raise ValueError(
                "Expected argument `target` to be one class for `Narcissus`, but there is not exactly one."
            )
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Expected images of 1 or 3 channels for `Narcissus`, but got {images.shape[1]}.")
        own = images[labels == target]
        if len(own) == 0:
            raise ValueError(
                f"Expected images of the target class {target} to learn `Narcissus` from, but there are none."
            )
        _, channels, height, width = own.shape
        others, classes = self._other_data().read((channels, height, width))
        # The target class comes behind the others.
        number = int(classes[-1]) + 1
        network = self.surrogate.train(torch.cat([others, own]), torch.cat([classes, torch.full((len(own),), number)]))
        return {"perturbation": self._optimize(network.requires_grad_(False), own, number)}

    def _transform(self, images: Tensor) -> Tensor:
        return torch.add(images, self.perturbation.to(images)).clamp_(0, 1)

    def _optimize(self, network: nn.Module, images: Tensor, number: int) -> Tensor:
        """Lower the network's loss of class ``number`` on images ``(N, C, H, W)`` uint8 by one perturbation."""
        device = next((tensor.device for tensor in network.state_dict().values()), torch.device("cpu"))
        perturbation = torch.zeros(images.shape[1:], device=device, requires_grad=True)
        optimizer = torch.optim.Adam([perturbation], lr=self.lr)
        for step in tqdm(range(self.steps), "perturbation", leave=False, delay=3):
            rows = _batch(len(images), self.batch_size, step, self.surrogate.seed)
            clean = images[rows].to(device).float() / 255
            logits = network((clean + perturbation).clamp(0, 1))
            loss = F.cross_entropy(logits, torch.full((len(rows),), number, device=device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                perturbation.clamp_(-self.epsilon, self.epsilon)
        return perturbation

    def _other_data(self) -> LabelledFolder:
        if self._others is None:
            raise ValueError(
                "Expected argument `ood` of `Narcissus` to be a folder of labelled images to learn the trigger from, "
                "but got None. Nothing is downloaded: set `ood` to a folder with one sub-folder of images per class, "
                "of anything but the target class."
            )
        return self._others


def _batch(count: int, size: int, step: int, seed: int) -> Tensor:
    """Return the rows of one step: epochs of shuffled rows, one after the other, the last batch of each smaller."""
    per_epoch = -(-count // size)
    epoch, number = divmod(step, per_epoch)
    order = torch.randperm(count, generator=keyed_generator(seed, "perturbation", epoch))
    return order[number * size : (number + 1) * size]
