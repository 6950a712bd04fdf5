"""Cognitive Distillation: how little of an image keeps the model's output."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection.base import InputDetector
from lightning_bd.callbacks.detection.features import FeatureTap
from lightning_bd.functional.cognitive_distillation import distill
from lightning_bd.functional.modes import mode, without_parameter_gradients

__all__ = ("CognitiveDistillation",)

_Target = Literal["logits", "features"]
_ALPHA = {"logits": 0.01, "features": 0.001}


class CognitiveDistillation(InputDetector):
    r"""Scores an image by the smallest mask that keeps the model's output on it (``cd``).

    With a trigger in the image the model looks at little else, so that its mask is small (`Huang et al., 2023
    <https://arxiv.org/abs/2301.10908>`_):

    .. math::
        s(x) = -\lVert m \rVert_1, \quad m = \arg\min_m \frac{1}{D} \lVert f(x) - f(x m + (1 - m) \delta) \rVert_1
        + \alpha \lVert m \rVert_1 + \beta \, \mathrm{TV}(m)

    It needs no clean data. :func:`~lightning_bd.functional.cognitive_distillation.distill` has the details; a batch
    costs ``steps`` passes forwards and backwards, in which no weight gets a gradient.

    Differs from the authors' code in that the colours :math:`\delta` are the same for all images, so that a score does
    not depend on the batch.

    Args:
        target: What :math:`f` is: the ``"logits"``, or the ``"features"`` that go into the last linear layer.
        alpha: Weight of the mask's norm, a non-negative float; ``None``: the paper's, 0.01 for logits, 0.001 for
            features.
        beta: Weight of the mask's total variation, a non-negative float; paper: 10, default of the authors' code: 1.
        steps: Steps of Adam, a positive integer; paper: 100.
        lr: Its step size, a positive float; paper: 0.1.
        mask_channels: 1 for one mask for all channels (paper), or the number of channels for one each.
        seed: Of the colours.
        layer: Module whose output are the features, instead of the input of the last linear layer.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> images = torch.rand(5, 1, 4, 4)
        >>> CognitiveDistillation(steps=2).score(model, images).shape
        torch.Size([5])
        >>> CognitiveDistillation(steps=2).masks(model, images).shape
        torch.Size([5, 1, 4, 4])
    """

    name = "cd"

    def __init__(
        self,
        target: _Target = "logits",
        alpha: float | None = None,
        beta: float = 1.0,
        steps: int = 100,
        lr: float = 0.1,
        mask_channels: int = 1,
        seed: int = 0,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if target not in get_args(_Target):
            raise ValueError(f"Expected argument `target` to be one of {get_args(_Target)}, but got {target!r}.")
        if layer is not None and target != "features":
            raise ValueError(f"Expected argument `layer` to be None unless `target` is 'features', but got {layer!r}.")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Expected argument `{name}` to be a non-negative float, but got {value}.")
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"Expected argument `lr` to be a positive float, but got {lr}.")
        for name, number in (("steps", steps), ("mask_channels", mask_channels)):
            if number < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {number}.")
        super().__init__(layer=layer, in_distribution=in_distribution)
        self.target = target
        self.alpha = _ALPHA[target] if alpha is None else alpha
        self.beta = beta
        self.steps = steps
        self.lr = lr
        self.mask_channels = mask_channels
        self.seed = seed

    def masks(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return what of each image keeps the output: 1 where it has to stay, 0 where any colour will do.

        Args:
            model: Maps images to logits; runs in evaluation mode and is left as it was.
            images: ``(B, C, H, W)`` in [0, 1], on the model's device.

        Returns:
            ``(B, mask_channels, H, W)`` in [0, 1].
        """
        with mode(model, training=False), torch.inference_mode(False), without_parameter_gradients(model):
            return self._masks(model, images.clone())

    def explain(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return :meth:`masks`, as pictures."""
        return self.masks(model, images)

    def threshold(self, clean_scores: Tensor, gamma: float = 1.0) -> float:
        """Return the score above which an image is suspicious.

        That of a mask whose norm is ``gamma`` standard deviations below the mean of clean images'.

        Args:
            clean_scores: ``(N,)`` scores of a little clean data, at least one.
            gamma: How many standard deviations (of all N, not corrected) below the mean; larger finds fewer.

        Raises:
            ValueError: If there are no scores.

        Example:
            >>> CognitiveDistillation().threshold(torch.tensor([-10.0, -14.0]))
            -10.0
        """
        if not clean_scores.numel():
            raise ValueError("Expected the scores of at least one clean image, but got none.")
        scores = clean_scores.detach().cpu().double()
        return float(scores.mean() + gamma * scores.std(correction=0))

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        return -self._masks(model, images).sum(dim=(1, 2, 3))

    def _masks(self, model: nn.Module, images: Tensor) -> Tensor:
        with _outputs(model, self.target, self.layer) as outputs:
            return distill(
                outputs,
                images,
                alpha=self.alpha,
                beta=self.beta,
                steps=self.steps,
                lr=self.lr,
                mask_channels=self.mask_channels,
                seed=self.seed,
            )


@contextmanager
def _outputs(model: nn.Module, target: _Target, layer: str | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function that maps images to outputs ``(B, D)`` that gradients flow through."""
    if target == "logits":
        yield model
        return
    tap = FeatureTap(model, layer, detach=False)
    tap.open()

    def outputs(images: Tensor) -> Tensor:
        tap.skip()
        model(images)
        return tap.take(len(images)).features

    try:
        yield outputs
    finally:
        tap.close()
