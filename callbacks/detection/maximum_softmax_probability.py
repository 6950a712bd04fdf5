"""Maximum softmax probability, the baseline."""

from torch import Tensor

from lightning_bd.callbacks.detection.base import FeatureDetector

__all__ = ("MaximumSoftmaxProbability",)


class MaximumSoftmaxProbability(FeatureDetector):
    r"""Score an image by the probability that the model leaves to the other classes.

    .. math:: s(x) = 1 - \max_c p_c(x), \qquad p(x) = \mathrm{softmax}(z(x))

    `Hendrycks and Gimpel, 2017 <https://arxiv.org/abs/1610.02136>`_. Differs from the paper in that the other classes'
    probabilities are added up, not taken from one: where the model is so sure that its probability rounds to 1 in
    float32 (from a margin of 17 between the logits on), images are still told apart. The order is that of
    :math:`-\max_c p_c`.

    Args:
        layer: Name of a module, for models without a linear layer at their end.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[30.0, 0.0], [20.0, 0.0], [0.0, 0.0]])
        >>> MaximumSoftmaxProbability().score(torch.zeros(3, 1), logits)
        tensor([9.3576e-14, 2.0612e-09, 5.0000e-01])
    """

    name = "msp"

    def __init__(self, layer: str | None = None, in_distribution: str | None = None) -> None:
        super().__init__(layer=layer, in_distribution=in_distribution)

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        top, predicted = logits.max(dim=1, keepdim=True)
        # In units of the predicted class's own share.
        others = (logits - top).exp().scatter(1, predicted, 0.0).sum(dim=1)
        return others / (1.0 + others)
