"""ViM: a virtual logit for what the features have outside of their principal subspace."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_bd.callbacks.detection.base import FeatureDetector
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.moments import in_double
from lightning_bd.callbacks.detection.processes import sum_over_processes

__all__ = ("ViM",)

# Residuals that are a smaller part of the features are rounding of float32.
_ROUNDING = 1e-6
# Features that are in float64 at a time.
_ROWS = 4096


class ViM(FeatureDetector):
    r"""Score an image by a virtual logit, the length of its features' residual, against the energy of its logits.

    .. math:: s(x) = \alpha \lVert R^\top (h(x) - o) \rVert - \log \sum_c e^{f_c(x)}

    `Wang et al., 2022 <https://arxiv.org/abs/2203.10807>`_: with the last linear layer's weight :math:`W`
    :math:`(K, D)` and bias :math:`b`, the origin :math:`o = -W^{+} b` is where all logits are 0. The columns of
    :math:`R` span what is left beside the :math:`P` principal directions of the fit images' :math:`h - o`, and
    :math:`\alpha = \sum \max_c f_c / \sum \lVert R^\top (h - o) \rVert` over the fit images makes the virtual logit as
    large as their largest logit, on average.

    The principal directions come from sums in float64 over all fit images. :math:`\alpha` needs a second look at them,
    when the directions are known; it is taken at up to ``max_samples`` images, evenly spread over the data, whose
    features are kept until then. That differs from the paper only with more images than that.

    Args:
        dimension: :math:`P`, in [1, D); ``None`` is the paper's: 1000 for D of at least 2048, 512 for at least 768,
            otherwise half of D.
        max_samples: Images of each process whose features are kept to find :math:`\alpha`, at least 2. They take
            ``4 * D`` bytes each.
        dataloader: Clean batches to fit on; ``None``: those of ``trainer.datamodule.clean_fit_dataloader()``.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If an argument is out of its range; when fitting, if there are no data, the model has no linear
            layer at its end, ``dimension`` is not below D, or the fit images have no residual.

    Example:
        >>> head = Head(torch.eye(2), torch.zeros(2))
        >>> features = torch.tensor([[4.0, 1.0], [4.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
        >>> detector = ViM()
        >>> detector.fit(features, logits=features, labels=torch.zeros(4, dtype=torch.long), head=head)
        >>> detector.fitted["alpha"].item()
        3.0
        >>> detector.score(torch.tensor([[3.0, 0.0], [3.0, 2.0]]), torch.tensor([[3.0, 0.0], [3.0, 2.0]]))
        tensor([-3.0486,  2.6867])
    """

    name = "vim"
    needs_fit: ClassVar[bool] = True
    uses_head: ClassVar[bool] = True

    def __init__(
        self,
        dimension: int | None = None,
        max_samples: int = 50_000,
        dataloader: Iterable[Any] | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if dimension is not None and dimension < 1:
            raise ValueError(f"Expected argument `dimension` to be a positive integer or None, but got {dimension}.")
        if max_samples < 2:
            raise ValueError(f"Expected argument `max_samples` to be an integer of at least 2, but got {max_samples}.")
        super().__init__(dataloader=dataloader, in_distribution=in_distribution)
        self.dimension = dimension
        self.max_samples = max_samples
        self._origin: Tensor | None = None
        self._squares: Tensor | None = None
        self._kept: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._seen = 0
        self._stride = 1

    def _begin(self, head: Head | None) -> None:
        self._reset()
        if head is None:
            raise ValueError("`ViM` needs the model's last linear layer, and the features that go into it.")
        weight, bias = in_double(head.weight.detach()), in_double(head.bias.detach())
        self._origin = -torch.linalg.pinv(weight) @ bias
        self._squares = torch.zeros(weight.shape[1], weight.shape[1], dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        assert self._origin is not None
        assert self._squares is not None
        centred = in_double(features) - self._origin
        self._squares += centred.T @ centred
        # Every `_stride`-th image, whatever the batches; twice as far apart once they are too many.
        chosen = slice(-self._seen % self._stride, None, self._stride)
        self._seen += len(features)
        self._kept.append(features[chosen].detach().clone())
        self._logits.append(logits[chosen].detach().amax(dim=1))
        while sum(len(part) for part in self._logits) > self.max_samples:
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._logits = [torch.cat(self._logits)[::2].clone()]
            self._stride *= 2

    def _finish(self) -> dict[str, Tensor]:
        assert self._origin is not None
        assert self._squares is not None
        origin, squares = self._origin, sum_over_processes(self._squares)
        seen = sum_over_processes(torch.tensor(float(self._seen), device=squares.device))
        if not float(seen):
            raise ValueError("Expected clean data to fit on, but got no image.")
        width = len(origin)
        dimension = _default_dimension(width) if self.dimension is None else self.dimension
        if not 1 <= dimension < width:
            raise ValueError(
                f"Expected argument `dimension` to be in [1, D) for D = {width} features, but got {dimension}."
            )
        values, vectors = torch.linalg.eigh(squares)
        residual = vectors[:, : width - dimension]
        rank = int((values > _ROUNDING**2 * values[-1]).sum())
        if rank <= dimension:
            raise ValueError(
                f"The fit images' features lie in a subspace of {rank} dimensions, so that nothing is left beside"
                f" {dimension} principal ones: fit on more images, or choose `dimension` below {rank}."
            )
        largest, lengths = squares.new_zeros(()), squares.new_zeros(())
        for features, logits in zip(self._kept, self._logits, strict=True):
            largest += logits.to(squares).sum()
            for part in torch.split(features, _ROWS):
                lengths += ((part.to(squares) - origin) @ residual).norm(dim=1).sum()
        # Processes that have kept fewer of their images count as much for each that they had.
        sums = sum_over_processes(torch.stack([largest, lengths]) * self._stride)
        self._reset()
        return {"origin": origin, "residual": residual.contiguous(), "alpha": sums[0] / sums[1]}

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        residual = self.fitted["residual"]
        lengths = ((features.to(residual.dtype) - self.fitted["origin"]) @ residual).norm(dim=1)
        virtual: Tensor = self.fitted["alpha"] * lengths
        return virtual - logits.to(residual.dtype).logsumexp(dim=1)

    def _reset(self) -> None:
        self._origin = self._squares = None
        self._kept, self._logits = [], []
        self._seen, self._stride = 0, 1


def _default_dimension(width: int) -> int:
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2
