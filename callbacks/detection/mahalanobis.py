"""Mahalanobis distance to the closest class."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from lightning_bd.callbacks.detection.base import FeatureDetector
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.moments import Gaussians, GaussianSums, whitening

__all__ = ("Mahalanobis", "closest_class", "fitted_classes")


class Mahalanobis(FeatureDetector):
    r"""Score an image by the squared Mahalanobis distance of its features to the closest class.

    .. math:: s(x) = \min_c\, (h(x) - \mu_c)^\top \Sigma^{+} (h(x) - \mu_c)

    `Lee et al., 2018 <https://arxiv.org/abs/1807.03888>`_: :math:`\mu_c` are the classes' mean features and
    :math:`\Sigma` is the covariance about them that all classes share, divided by the number of images. Differs from
    the paper in that it looks at one layer and leaves the images as they are: no input is perturbed towards the closest
    class, and no regression weighs several layers.

    Features of a network are rarely of full rank: there are dead units, or fewer images than features.
    :math:`\Sigma^{+}` is the pseudo-inverse, as in the authors' code: directions in which the fit images hardly vary do
    not count, whatever an image does there. There is no other regularisation. It is computed in float64 from the
    eigenvalues; the score does not depend on the features' scale, nor on any invertible linear map of them.

    Args:
        rtol: Directions whose variance is up to this part of the largest one are left out, in [0, 1). The default is a
            standard deviation of 1e-5 of the largest, which float32 features still resolve.
        dataloader: Clean batches to fit on; ``None``: those of ``trainer.datamodule.clean_fit_dataloader()``.
        layer: Name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If ``rtol`` is out of its range; when fitting, if there are no data, a class has no image, a label
            is not one of the model's classes, or the features do not vary within the classes.

    Example:
        >>> import torch
        >>> detector = Mahalanobis()
        >>> features = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
        >>> detector.fit(features, torch.zeros(4, 2), labels=torch.tensor([0, 0, 1, 1]))
        >>> detector.score(torch.tensor([[0.0], [3.0], [8.0]]), torch.zeros(3, 2))
        tensor([0., 9., 4.])
    """

    name = "mahalanobis"
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
        return fitted_classes(found, self.rtol)

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        return closest_class(features, self.fitted)


def fitted_classes(found: Gaussians, rtol: float) -> dict[str, Tensor]:
    """Return what :func:`closest_class` needs.

    Args:
        found: The distributions of the classes' features.
        rtol: Eigenvalues up to this part of the largest are left out.

    Raises:
        ValueError: If the features do not vary within the classes.
    """
    matrix = whitening(found.within, rtol, found.mean_square)
    return {"mean": found.mean, "whitening": matrix, "means": (found.means - found.mean) @ matrix}


def closest_class(features: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """Return the squared Mahalanobis distance of features to the closest class mean.

    Args:
        features: ``(B, D)`` float32.
        fitted: From :func:`fitted_classes`.

    Returns:
        ``(B,)``, of the dtype of ``fitted``.
    """
    centred = features.to(fitted["mean"].dtype) - fitted["mean"]
    white, means = centred @ fitted["whitening"], fitted["means"]
    squares = white.square().sum(dim=1, keepdim=True) + means.square().sum(dim=1) - 2.0 * white @ means.T
    return squares.amin(dim=1).clamp_min(0.0)
