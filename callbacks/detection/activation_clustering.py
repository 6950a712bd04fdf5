"""Activation clustering: the poisoned images of a label are a cluster of their own."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from sklearn import config_context
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from lightning_bd.callbacks.detection.base import DatasetDetector
from lightning_bd.callbacks.detection.label_groups import best_cut, label_groups, principal_components
from lightning_bd.functional.draws import keyed_seed

__all__ = ("ActivationClustering", "Reduction")

Reduction = Literal["ica", "pca"]


class ActivationClustering(DatasetDetector):
    r"""Cut each label's images into two clusters, and suspect labels that fall apart well, the smaller cluster most.

    The features of each label are reduced to few dimensions and clustered by 2-means (`Chen et al., 2018
    <https://arxiv.org/abs/1811.03728>`_). The paper then decides: a label is poisoned if the clusters fit well (a high
    silhouette), and its poisoned images are the smaller cluster. Differs from the paper in that the silhouette becomes
    a weight and the cluster a margin, so that all images of a data set are ranked:

    .. math::
        s(x, y) = \max(S_y, 0) \left( 1 + \frac{1}{2}
        \frac{\lVert z(x) - c_\text{large} \rVert - \lVert z(x) - c_\text{small} \rVert}
        {\lVert c_\text{large} - c_\text{small} \rVert} \right)

    with the reduced features :math:`z`, the clusters' centres :math:`c` and the mean silhouette :math:`S_y`. The
    fraction is in [-1, 1] and positive for the members of the smaller cluster. The label comes first and the cluster
    second: where the poisoned images are half of a label or more, as a rate of 0.1 makes them of one target among ten
    labels, the wrong cluster comes first, but still the right label.

    In ten dimensions of equal variance the best two clusters of a label with few images, or few poisoned ones, need
    not be the clean and the poisoned; ``"pca"`` keeps the differences in variance and finds smaller groups. Images of a
    label with fewer than 10 images score 0, and so do those of a label whose features are all the same. The score does
    not depend on the order of the images.

    Args:
        reduction: How the features are reduced. ``"ica"``, the paper's: independent components, which are a rotation of
            the principal components scaled to unit variance; neither distances nor clusters see the rotation, so that
            it is left out. ``"pca"``: principal components as they are.
        dimensions: Dimensions to reduce to, positive; 10 in the paper.
        seed: Seed of the ten pairs of centres that 2-means starts from, beside those that a cut along each dimension
            gives; the best end is taken.
        layer: Qualified name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Has no effect: a data set is judged by itself.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> features = torch.zeros(40, 3)
        >>> features[:, 0] = torch.linspace(-0.1, 0.1, 40)
        >>> features[36:, 1] = 5.0
        >>> scores = ActivationClustering().score(features, torch.zeros(40, dtype=torch.int64))
        >>> scores.topk(4).indices.sort().values
        tensor([36, 37, 38, 39])
    """

    name = "ac"

    def __init__(
        self,
        reduction: Reduction = "ica",
        dimensions: int = 10,
        seed: int = 0,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        super().__init__(layer=layer, in_distribution=in_distribution)
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"Expected argument `reduction` to be one of {get_args(Reduction)}, but got {reduction!r}."
            )
        if dimensions < 1:
            raise ValueError(f"Expected argument `dimensions` to be a positive integer, but got {dimensions}.")
        self.reduction: Reduction = reduction
        self.dimensions = dimensions
        self.seed = seed

    def _score(self, features: Tensor, labels: Tensor) -> Tensor:
        own = features.cpu()
        # 2-means starts from images by their number: the same images have to come in the same order.
        order = _canonical_order(own)
        scores = torch.zeros(len(own))
        for group in label_groups(own[order], labels.cpu()[order]):
            reduced = principal_components(group.centred, self.dimensions)
            if self.reduction == "ica":
                reduced = reduced / reduced.square().mean(dim=0).sqrt()
            if reduced.shape[1]:
                scores[order[group.rows]] = torch.from_numpy(self._suspicion(reduced.numpy())).float()
        return scores.to(features.device)

    def _suspicion(self, reduced: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the scores of a label's images by their reduced features ``(n, d)``."""
        cluster = self._cluster(reduced)
        smaller = cluster == int(2 * np.count_nonzero(cluster) <= len(cluster))
        small, large = reduced[smaller].mean(axis=0), reduced[~smaller].mean(axis=0)
        to_small, to_large = (np.linalg.norm(reduced - centre, axis=1) for centre in (small, large))
        with config_context(working_memory=64):
            silhouette = float(silhouette_score(reduced, smaller))
        margins: npt.NDArray[np.float64] = (to_large - to_small) / np.linalg.norm(large - small)
        return max(silhouette, 0.0) * (1 + margins / 2)

    def _cluster(self, reduced: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        """Return the cluster, 0 or 1, of each image, ``(n,)``."""
        start = keyed_seed(self.seed, "activation_clustering") % 2**32
        found = [KMeans(n_clusters=2, n_init=10, random_state=start).fit(reduced)]
        # In many dimensions of equal variance, starts at random images seldom lead to a small cluster.
        for along in torch.from_numpy(reduced).unbind(dim=1):
            above = best_cut(along).numpy()
            centres = np.stack([reduced[~above].mean(axis=0), reduced[above].mean(axis=0)])
            found.append(KMeans(n_clusters=2, init=centres, n_init=1).fit(reduced))
        best: npt.NDArray[np.int32] = min(found, key=lambda fit: float(fit.inertia_)).labels_
        return best


def _canonical_order(features: Tensor) -> Tensor:
    """Return an order of the rows that depends on nothing but what they hold."""
    rows = features.contiguous().numpy()
    return torch.tensor(sorted(range(len(rows)), key=lambda row: rows[row].tobytes()), dtype=torch.int64)
