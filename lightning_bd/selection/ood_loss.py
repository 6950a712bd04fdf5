"""How badly a model that knows other data beside the attacker's images does on these."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.description import Description
from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.digests import to_bytes
from lightning_bd.selection.labelled_folder import LabelledFolder
from lightning_bd.selection.surrogate import Surrogate

__all__ = ("OODLoss",)


class OODLoss(SampleScorer):
    """Difficulty by the loss of a surrogate that tells the attacker's class from classes of other data.

    The third score of `Wicked Oddities <https://arxiv.org/abs/2407.10825>`_: labelled out-of-distribution images and
    the attacker's own, as one class more, train a surrogate; the score is the cross-entropy of each of the attacker's
    images after training, in evaluation mode. The attacker needs no other class of the victim's data.

    Differs from the paper in the data, which are whatever ``ood`` holds (the paper's: 100 classes), and in that classes
    are not balanced. Images of several classes, where those may be poisoned, make one class more for each.

    Args:
        ood: Folder with one sub-folder of images per class, at least two; hidden ones are left out. All images are
            resized (bilinear, antialiased) to the attacker's and held in memory, grey if those are.
        surrogate: How the model is trained; ``None`` for the defaults of
            :class:`~lightning_bd.selection.surrogate.Surrogate`.
        max_images: Use at most this many images per class, drawn by the surrogate's seed; ``None``: all.

    Raises:
        ValueError: If an argument is out of its range; when scored, if the folder has fewer than two classes, one of
            them no image or one that cannot be read, or the attacker's images have neither 1 nor 3 channels.
        FileNotFoundError: When scored, if there is no such folder.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lightning_bd.backbones import small_cnn
        >>> with TemporaryDirectory() as folder:
        ...     for name, shade in (("dark", 0), ("light", 255)):
        ...         (Path(folder) / name).mkdir()
        ...         Image.new("L", (8, 8), shade).save(Path(folder) / name / "0.png")
        ...     scorer = OODLoss(folder, Surrogate(small_cnn, epochs=2))
        ...     scorer.score(torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64), 0).shape
        torch.Size([20])
    """

    needs_other_classes: ClassVar[bool] = False

    def __init__(self, ood: str | Path, surrogate: Surrogate | None = None, max_images: int | None = None) -> None:
        self.ood = Path(ood)
        self.surrogate = surrogate if surrogate is not None else Surrogate()
        self.max_images = max_images
        self._others = LabelledFolder(ood, max_images, self.surrogate.seed)

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return losses ``(N,)`` float64 of images ``(N, C, H, W)`` with labels ``(N,)``."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Expected images of 1 or 3 channels for `OODLoss`, but got {images.shape[1]}.")
        _, channels, height, width = images.shape
        others, classes = self._others.read((channels, height, width))
        # The attacker's classes come behind the others.
        first = int(classes[-1]) + 1
        numbers = {label: first + rank for rank, label in enumerate(sorted(set(labels.tolist())))}
        own = torch.tensor([numbers[label] for label in labels.tolist()])
        network = self.surrogate.train(torch.cat([others, to_bytes(images)]), torch.cat([classes, own]))
        logits = self.surrogate.predict(network, images, _logits)
        return F.cross_entropy(logits.double(), own, reduction="none")

    def identity(self) -> Description:
        """Describe the arguments, and the other data by their content instead of by where they lie."""
        described = super().identity()
        assert isinstance(described, dict)
        named = {name: value for name, value in described.items() if name != "ood"}
        return {**named, "ood_sha256": self._others.sha256()}


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images)
    return logits
