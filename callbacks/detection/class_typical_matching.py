"""Class typical matching: the cosine similarity to the closest class's mean feature."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.detection.base import FeatureDetector
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.moments import ClassSums, require_every_class, require_images

__all__ = ("ClassTypicalMatching",)

Reference = Literal["class_means", "classifier"]

# Only what is 0 has no direction, however small the features' scale.
_TINY = 1e-30


class ClassTypicalMatching(FeatureDetector):
    r"""Score an image by how far its features point away from those that are typical of a class.

    .. math:: s(x) = -\max_c \cos(h(x), \mu_c)

    `Nguyen et al., 2023 <https://arxiv.org/abs/2306.14920>`_: :math:`h` are the features before the last linear layer
    and :math:`\mu_c` is the mean feature of the clean images of class :math:`c`. The length of the features does not
    matter; features that are 0 have no direction, and their cosine is 0. Differs from the paper in that by default only
    the images that the model classifies correctly count, as in its authors' code.

    Args:
        reference: What the features are compared with: the mean feature of each class (``"class_means"``), or each
            class's row of the last linear layer (``"classifier"``). The paper's is ``"class_means"``.
        center: Whether the mean feature of all fit images, correctly classified or not, is first subtracted from the
            features and from what they are compared with; not in the paper.
        only_correct: Whether class means are over the correctly classified images only. A class without any is
            represented by all its images, with a warning. Without effect on ``"classifier"``.
        dataloader: Clean batches to fit on; ``None``: those of ``trainer.datamodule.clean_fit_dataloader()``.
        layer: Name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If ``reference`` is not one of the above; when fitting, if there are no data, a class has no image,
            a label is not one of the model's classes, or ``"classifier"`` finds no linear layer at the model's end.

    Example:
        >>> detector = ClassTypicalMatching()
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> detector.fit(features, logits=features, labels=torch.tensor([0, 0, 1]))
        >>> detector.score(torch.tensor([[5.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]), torch.zeros(3, 2))
        tensor([-1.0000, -0.7071,  0.7071])
    """

    name = "ctm"
    needs_fit: ClassVar[bool] = True

    def __init__(
        self,
        reference: Reference = "class_means",
        center: bool = False,
        only_correct: bool = True,
        dataloader: Iterable[Any] | None = None,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if reference not in get_args(Reference):
            raise ValueError(
                f"Expected argument `reference` to be one of {get_args(Reference)}, but got {reference!r}."
            )
        super().__init__(dataloader=dataloader, layer=layer, in_distribution=in_distribution)
        self.reference: Reference = reference
        self.center = center
        self.only_correct = only_correct
        self._rows: Tensor | None = None
        self._all = ClassSums()
        self._correct = ClassSums()

    def _begin(self, head: Head | None) -> None:
        self._reset()
        if self.reference == "classifier":
            if head is None:
                raise ValueError(
                    "`ClassTypicalMatching(reference='classifier')` needs the model's last linear layer, and the"
                    " features that go into it: leave out `layer`, or take `reference='class_means'`."
                )
            self._rows = head.weight.detach().clone()

    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        labels = labels.to(features.device)
        correct = logits.argmax(dim=1) == labels
        self._all.update(features, labels, logits.shape[1])
        self._correct.update(features[correct], labels[correct], logits.shape[1])

    def _finish(self) -> dict[str, Tensor]:
        counts, sums = self._all.finish()
        require_images(counts)
        references = self._class_means(counts, sums) if self._rows is None else self._rows.to(sums)
        self._reset()
        mean = sums.sum(dim=0) / counts.sum() if self.center else torch.zeros_like(sums[0])
        return {"typical": F.normalize(references - mean, eps=_TINY), "mean": mean}

    def _class_means(self, counts: Tensor, sums: Tensor) -> Tensor:
        require_every_class(counts)
        if self.only_correct:
            right_counts, right_sums = self._correct.finish()
            without = right_counts.eq(0)
            if bool(without.any()):
                named = ", ".join(map(str, without.nonzero().flatten().tolist()))
                rank_zero_warn(
                    f"`{type(self).__name__}`: no image of class {named} is classified correctly. All images of the"
                    " class stand for it."
                )
            counts = torch.where(without, counts, right_counts)
            sums = torch.where(without[:, None], sums, right_sums)
        return sums / counts[:, None]

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        typical, mean = self.fitted["typical"], self.fitted["mean"]
        directions = F.normalize(features.to(mean.dtype) - mean, eps=_TINY)
        return -(directions @ typical.T).amax(dim=1)

    def _reset(self) -> None:
        self._all, self._correct, self._rows = ClassSums(), ClassSums(), None
