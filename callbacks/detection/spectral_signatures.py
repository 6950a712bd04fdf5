"""Spectral signatures: poisoned images lie far out along their label's main direction."""

from torch import Tensor

from lightning_bd.callbacks.detection.base import DatasetDetector
from lightning_bd.callbacks.detection.label_groups import label_groups, principal_components

__all__ = ("SpectralSignatures",)


class SpectralSignatures(DatasetDetector):
    r"""Score an image by how far it lies from its label's mean along the direction in which the label varies most.

    With :math:`\hat h_y` the mean feature of the images labelled :math:`y` and :math:`v_y` the top right singular
    vector of their centred features,

    .. math:: s(x, y) = \left( (h(x) - \hat h_y)^\top v_y \right)^2

    (`Tran et al., 2018 <https://arxiv.org/abs/1811.00636>`_). A minority of images whose mean is far from that of the
    others makes the direction between the two means the label's main one, and lies far out along it. Differs from the
    paper in that it only ranks: there, the images with the highest scores are dropped, as many of each label as 1.5
    times those expected to be poisoned. Scores of different labels are compared as they are, which the paper's
    procedure does not need: a label whose features vary more has higher ones.

    It cannot tell the poisoned from the others where they are about half of a label, for both then lie equally far from
    the mean. Images of a label with fewer than 10 images score 0, and so do those of a label whose features are all the
    same.

    Args:
        layer: Qualified name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Has no effect: a data set is judged by itself.

    Example:
        >>> import torch
        >>> features = torch.zeros(40, 3)
        >>> features[:, 0] = torch.linspace(-0.1, 0.1, 40)
        >>> features[36:, 1] = 5.0
        >>> SpectralSignatures().score(features, torch.zeros(40, dtype=torch.int64)).topk(4).indices.sort().values
        tensor([36, 37, 38, 39])
    """

    name = "spectral"

    def __init__(self, layer: str | None = None, in_distribution: str | None = None) -> None:
        super().__init__(layer=layer, in_distribution=in_distribution)

    def _score(self, features: Tensor, labels: Tensor) -> Tensor:
        scores = features.new_zeros(len(features))
        for group in label_groups(features, labels):
            squares = principal_components(group.centred, count=1).square().sum(dim=1)
            scores[group.rows.to(scores.device)] = squares.to(scores)
        return scores
