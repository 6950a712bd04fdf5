"""Label-consistent poison: images that are hard to learn from, so that the trigger is learned instead."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lightning_bd.crafting.base import Crafting
from lightning_bd.crafting.cache import remembered
from lightning_bd.description import describe
from lightning_bd.functional.modes import mode, without_parameter_gradients
from lightning_bd.functional.projected_gradient import projected_gradient_ascent
from lightning_bd.selection.digests import image_digests
from lightning_bd.selection.surrogate import Surrogate

__all__ = ("LabelConsistent",)


class LabelConsistent(Crafting):
    """Move images of the target class away from it before they get the trigger; their labels stay.

    `Turner et al., 2019 <https://arxiv.org/abs/1912.02771>`_: a surrogate is trained on the clean split, and projected
    gradient ascent raises its cross-entropy of the true label within ``epsilon`` per pixel. The victim cannot learn the
    class from such images and learns the trigger, which the poison puts on top. The attacker must know the images and
    labels of all classes.

    Differs from the paper in that only its L-infinity adversarial examples are made: neither those within an L2 ball
    nor the interpolations of a generative model. Ascent starts at the image.

    Args:
        surrogate: How the surrogate is trained; ``None`` for the defaults of
            :class:`~lightning_bd.selection.surrogate.Surrogate`. Its batch size is also that of the ascent.
        epsilon: Largest change of a pixel, in [0, 1]; counted in whole 8-bit levels, rounded down. 0 changes nothing.
        step_size: Step of the ascent, positive.
        steps: Number of its steps, at least 1.
        robust_epsilon: Radius of the surrogate's adversarial training
            (`Madry et al., 2018 <https://arxiv.org/abs/1706.06083>`_), in [0, 1].
        robust_steps: Steps of that, each a quarter of the radius; every step of training costs so many more passes.
            0: the surrogate is trained on clean images.
        cache_dir: Folder where crafted images are kept; ``None``: ``crafting`` in the folder that the environment
            variable ``LIGHTNING_BD_CACHE`` names, else in ``~/.cache/lightning_bd``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_bd.backbones import small_cnn
        >>> images, labels = torch.arange(512, dtype=torch.uint8).view(8, 1, 8, 8), torch.arange(8) % 2
        >>> with TemporaryDirectory() as folder:
        ...     crafting = LabelConsistent(Surrogate(small_cnn, epochs=1), epsilon=8 / 255, cache_dir=folder)
        ...     made = crafting.craft(torch.tensor([2]), torch.arange(8), labels, images.__getitem__)
        >>> (made.int() - images[2].int()).abs().max()
        tensor(8, dtype=torch.int32)
    """

    needs_clean_label: ClassVar[bool] = True

    def __init__(
        self,
        surrogate: Surrogate | None = None,
        epsilon: float = 16 / 255,
        step_size: float = 1.5 / 255,
        steps: int = 100,
        robust_epsilon: float = 8 / 255,
        robust_steps: int = 7,
        cache_dir: str | Path | None = None,
    ) -> None:
        for name, radius in (("epsilon", epsilon), ("robust_epsilon", robust_epsilon)):
            if not 0 <= radius <= 1:
                raise ValueError(f"Expected argument `{name}` to be a float in [0, 1], but got {radius}.")
        if not step_size > 0:
            raise ValueError(f"Expected argument `step_size` to be a positive float, but got {step_size}.")
        for name, value, least in (("steps", steps, 1), ("robust_steps", robust_steps, 0)):
            if value < least:
                raise ValueError(f"Expected argument `{name}` to be an integer of at least {least}, but got {value}.")
        self.surrogate = surrogate if surrogate is not None else Surrogate()
        self.epsilon = epsilon
        self.step_size = step_size
        self.steps = steps
        self.robust_epsilon = robust_epsilon
        self.robust_steps = robust_steps
        # Under a name of its own: where images are kept is not part of what a run is.
        self._folder = None if cache_dir is None else Path(cache_dir)

    @property
    def levels(self) -> int:
        """Largest change of a pixel in 8-bit levels."""
        # 16 / 255 as people write it, with some digits, is 16 levels.
        return math.floor(self.epsilon * 255 + 1e-4)

    @torch.inference_mode(False)
    def craft(self, chosen: Tensor, positions: Tensor, labels: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Make the images; see :meth:`Crafting.craft <lightning_bd.crafting.Crafting.craft>`.

        Raises:
            ValueError: If the surrogate cannot be trained.
        """
        if self.levels == 0:
            return read(chosen)
        digests = [digest for part in torch.split(positions, 4096) for digest in image_digests(read(part))]
        wanted = torch.isin(positions, chosen)
        # In an order of the images' own, so that theirs in the data set does not matter.
        keys = list(zip(digests, labels.tolist(), (~wanted).tolist(), strict=True))
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
        positions, labels, wanted = positions[order], labels[order], wanted[order]
        images = read(positions)
        found = remembered(
            type(self).__name__,
            describe(self),
            [digests[row] for row in order.tolist()],
            labels,
            wanted,
            (len(chosen), *images.shape[1:]),
            lambda: self.perturbed(self.trained(images, labels), images[wanted], labels[wanted]),
            self._folder,
        )
        made = positions[wanted]
        back = made.argsort()
        return found[back[torch.searchsorted(made[back], chosen)]]

    def trained(self, images: Tensor, labels: Tensor) -> nn.Module:
        """Train the surrogate.

        Args:
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1].
            labels: ``(N,)`` int64.

        Returns:
            It maps images in [0, 1] to logits.
        """
        return self.surrogate.train(images, labels, perturb=self._robust if self.robust_steps else None)

    def perturbed(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Raise a network's cross-entropy of each image.

        Args:
            network: Maps images in [0, 1] to logits.
            images: ``(P, C, H, W)`` uint8.
            labels: ``(P,)`` int64, their true labels.

        Returns:
            ``(P, C, H, W)`` uint8, no pixel more than :attr:`levels` away.
        """
        device = next(tensor.device for tensor in (*network.buffers(), *network.parameters()))
        size, levels = self.surrogate.batch_size, self.levels
        parts = []
        for part, wanted in tqdm(
            list(zip(torch.split(images, size), torch.split(labels, size), strict=True)),
            "label-consistent",
            leave=False,
            delay=3,
        ):
            batch = part.to(device).float() / 255
            moved = _ascend(network, batch, wanted.to(device), levels / 255, self.step_size, self.steps)
            # The ball's radius is whole levels, so rounding does not leave it.
            parts.append((moved * 255).round().to(torch.uint8).cpu())
        return torch.cat(parts)

    def _robust(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        step_size = self.robust_epsilon / 4
        if step_size == 0:
            return images
        return _ascend(network, images, labels, self.robust_epsilon, step_size, self.robust_steps)


def _ascend(network: nn.Module, images: Tensor, labels: Tensor, epsilon: float, step_size: float, steps: int) -> Tensor:
    with mode(network, training=False), without_parameter_gradients(network):
        return projected_gradient_ascent(
            lambda moved: F.cross_entropy(network(moved), labels, reduction="sum"), images, epsilon, step_size, steps
        )
