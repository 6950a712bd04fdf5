"""Mahalanobis distance to the closest class, relative to that to all images."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from lightning_bd.callbacks.detection.base import FeatureDetector
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.mahalanobis import closest_class, fitted_classes
from lightning_bd.callbacks.detection.moments import GaussianSums, whitening

__all__ = ("RelativeMahalanobis",)


class RelativeMahalanobis(FeatureDetector):
    r"""Score an image by how much farther its features are from the closest class than from all images together.

    .. math:: s(x) = \min_c\, (h - \mu_c)^\top \Sigma^{+} (h - \mu_c) - (h - \mu)^\top \Sigma_0^{+} (h - \mu)

    `Ren et al., 2021 <https://arxiv.org/abs/2106.09022>`_: :math:`h` are the features of :math:`x`; class means
    :math:`\mu_c` and shared covariance :math:`\Sigma` are those of :class:`~lightning_bd.callbacks.Mahalanobis`;
    :math:`\mu` and :math:`\Sigma_0` are mean and covariance of all fit images, whatever their class. What is unusual in
    directions that tell no classes apart adds to both distances and drops out. Differs from the paper in that
    covariances are inverted by the pseudo-inverse, so that they need not be of full rank.

    Args:
        rtol: Directions whose variance is up to this part of the largest one are left out, of each covariance, in
            [0, 1). The default is a standard deviation of 1e-5 of the largest, which float32 features still resolve.
        dataloader: Clean batches to fit on; ``None``: those of ``trainer.datamodule.clean_fit_dataloader()``.
        layer: Name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If ``rtol`` is out of its range; when fitting, if there are no data, a class has no image, a label
            is not one of the model's classes, or the features do not vary within the classes.

    Example:
        >>> import torch
        >>> detector = RelativeMahalanobis()
        >>> features = torch.tensor([[-6.0], [-4.0], [4.0], [6.0]])
        >>> detector.fit(features, torch.zeros(4, 2), labels=torch.tensor([0, 0, 1, 1]))
        >>> detector.score(torch.tensor([[-5.0], [0.0], [6.0]]), torch.zeros(3, 2))
        tensor([-0.9615, 25.0000, -0.3846])
    """

    name = "rmd"
    needs_fit: ClassVar[bool] = True

    def __init__(
        self,
        rtol: float = 1e-10,
        dataloader: Iterable[Any] | None = None,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if not 0.0 <= rtol < 1.0:
            raise ValueError(f"Expected argument `rtol` to be a float in [0, 1), but got {rtol}.")
        super().__init__(dataloader=dataloader, layer=layer, in_distribution=in_distribution)
        self.rtol = rtol
        self._sums = GaussianSums()

    def _begin(self, head: Head | None) -> None:
        self._sums = GaussianSums()

    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._sums.update(features, labels, logits.shape[1])

    def _finish(self) -> dict[str, Tensor]:
        found, self._sums = self._sums.finish(), GaussianSums()
        background = whitening(found.total, self.rtol, found.mean_square)
        return {**fitted_classes(found, self.rtol), "background": background}

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        centred = features.to(self.fitted["mean"].dtype) - self.fitted["mean"]
        return closest_class(features, self.fitted) - (centred @ self.fitted["background"]).square().sum(dim=1)
