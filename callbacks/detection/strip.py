"""STRIP: whether a prediction survives that other images are laid over the image."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection.base import InputDetector
from lightning_bd.callbacks.detection.processes import gather_over_processes
from lightning_bd.functional.draws import keyed_generator

__all__ = ("STRIP",)

_Blend = Literal["add", "average"]
# Of one forward pass, for memory; a larger batch goes with one overlay at a time.
_IMAGES_PER_PASS = 1024


class STRIP(InputDetector):
    r"""Scores an image by how sure the model stays when clean images are laid over it (``strip``).

    A trigger forces its class through most overlays (`Gao et al., 2019 <https://arxiv.org/abs/1902.06531>`_):

    .. math::
        s(x) = -\frac{1}{N} \sum_{n=1}^{N} H(\mathrm{softmax} f(x \oplus o_n)), \quad H(p) = -\sum_k p_k \log_2 p_k

    It is fitted on clean data, of which it keeps ``num_overlays`` images, drawn at random; labels are not used.

    Differs from the paper in that all images get the same overlays, so that a score does not depend on the batch; and
    from the authors' code, which adds images without a bound, in that a sum is clipped to [0, 1].

    Args:
        num_overlays: Overlays :math:`o_n` of each image, a positive integer; paper: 100. All images that there are if
            the clean data have fewer.
        blend: ``"add"``: both images with weight 1, clipped to [0, 1] (paper), which saturates bright images;
            ``"average"``: both with weight 1/2, as later toolkits do.
        seed: Of the choice of the overlays.
        dataloader: Clean batches to fit on; ``None``: that of ``trainer.datamodule.clean_fit_dataloader()``.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> clean = torch.rand(8, 1, 4, 4)
        >>> detector = STRIP(num_overlays=4)
        >>> detector.fit(model, [(clean, torch.zeros(8).long())])
        >>> detector.score(model, clean).shape
        torch.Size([8])
    """

    name = "strip"
    needs_fit = True

    def __init__(
        self,
        num_overlays: int = 100,
        blend: _Blend = "add",
        seed: int = 0,
        dataloader: Iterable[Any] | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if num_overlays < 1:
            raise ValueError(f"Expected argument `num_overlays` to be a positive integer, but got {num_overlays}.")
        if blend not in get_args(_Blend):
            raise ValueError(f"Expected argument `blend` to be one of {get_args(_Blend)}, but got {blend!r}.")
        super().__init__(dataloader=dataloader, in_distribution=in_distribution)
        self.num_overlays = num_overlays
        self.blend = blend
        self.seed = seed

    def _fit(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        generator = keyed_generator(self.seed, "strip")
        kept: Tensor | None = None
        tickets = torch.empty(0, dtype=torch.float64)
        for images, _ in batches:
            # The images with the lowest tickets of all are a random sample, whatever the batches.
            tickets = torch.cat([tickets, torch.rand(len(images), dtype=torch.float64, generator=generator)])
            best = tickets.argsort()[: self.num_overlays]
            together = images if kept is None else torch.cat([kept, images])
            kept, tickets = together[best.to(images.device)], tickets[best]
        if kept is None or not len(kept):
            raise ValueError("Expected clean images to lay over others, but got none.")
        # All processes use the first one's.
        return {"overlays": gather_over_processes(kept)[: self.num_overlays]}

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        overlays = self.fitted["overlays"].to(images)
        if overlays.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"Expected images of the shape that it was fitted on, {tuple(overlays.shape[1:])}, but got"
                f" {tuple(images.shape[1:])}."
            )
        entropies = []
        for part in torch.split(overlays, max(1, _IMAGES_PER_PASS // max(1, len(images)))):
            blends = images + part[:, None]
            blends = blends.clamp(0, 1) if self.blend == "add" else blends / 2
            entropies.append(_entropy(model(blends.flatten(0, 1))).view(len(part), len(images)))
        return -torch.cat(entropies).mean(dim=0)


def _entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax probabilities in bits."""
    logs = logits.float().log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1) / math.log(2)
