"""Distance to the k-th nearest neighbour."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.detection.base import FeatureDetector
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.moments import in_double
from lightning_bd.callbacks.detection.processes import gather_over_processes

__all__ = ("KNearestNeighbors", "kth_largest")

# Columns that one maximum stands for in the search; 16 was the fastest of 8, 16, 25, 32 and 50.
_BLOCK = 16
# Below this squared distance, 2 - 2 cos has lost so many digits of float32 that the distance is off by up to 1e-5.
_NEAR = 1 / 512
# Rows of the bank that are in float64 at a time.
_PIECE = 4096
# Only what is 0 has no direction, however small the features' scale.
_TINY = 1e-30


class KNearestNeighbors(FeatureDetector):
    r"""Score an image by the distance of its features to the k-th nearest of the fit images'.

    .. math:: s(x) = \lVert z(x) - z_{(k)} \rVert, \qquad z(x) = h(x) / \lVert h(x) \rVert

    `Sun et al., 2022 <https://arxiv.org/abs/2204.06507>`_: :math:`z_{(k)}` is the k-th nearest of the normalised
    features of the fit images, the bank. Features that are 0 stay 0.

    All fit images count, whatever their label, and their features are kept: ``4 * N * D`` bytes, in checkpoints too.
    Distances are exact: they come from one matrix product and, where that is too coarse in float32 (distances below
    0.044), a second one in float64.

    Args:
        k: Which neighbour, at least 1 and at most the number of fit images. The paper's is 50 for CIFAR-10, 200 for
            CIFAR-100 and 1000 for ImageNet.
        max_memory: Bytes that the similarities of queries and bank may take at a time, positive; a single query's are
            always taken together. ``None``: 32 MiB on a CPU, 512 MiB elsewhere.
        dataloader: Clean batches to fit on; ``None``: those of ``trainer.datamodule.clean_fit_dataloader()``.
        layer: Name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If an argument is out of its range; when fitting, if there are fewer than ``k`` images.

    Example:
        >>> detector = KNearestNeighbors(k=2)
        >>> features = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> detector.fit(features, torch.zeros(3, 2), labels=torch.tensor([0, 0, 1]))
        >>> detector.score(torch.tensor([[5.0, 0.0], [0.0, -1.0]]), torch.zeros(2, 2))
        tensor([0.8944, 1.8974])
    """

    name = "knn"
    needs_fit: ClassVar[bool] = True

    def __init__(
        self,
        k: int = 50,
        max_memory: int | None = None,
        dataloader: Iterable[Any] | None = None,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"Expected argument `k` to be a positive integer, but got {k}.")
        if max_memory is not None and max_memory < 1:
            raise ValueError(f"Expected argument `max_memory` to be a positive integer or None, but got {max_memory}.")
        super().__init__(dataloader=dataloader, layer=layer, in_distribution=in_distribution)
        self.k = k
        self.max_memory = max_memory
        self._rows: list[Tensor] = []

    def _begin(self, head: Head | None) -> None:
        self._rows = []

    @torch.no_grad()
    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._rows.append(_unit(features))

    def _finish(self) -> dict[str, Tensor]:
        rows, self._rows = self._rows, []
        if not rows:
            raise ValueError("Expected clean data to fit on, but got no image.")
        bank = gather_over_processes(torch.cat(rows))
        if len(bank) < self.k:
            raise ValueError(
                f"Expected at least `k` images to fit on, but got {len(bank)} for k = {self.k}: fit on more images, or"
                " choose a smaller `k`."
            )
        has_direction = bank.any(dim=1)
        return {"bank": bank[has_direction], "zeros": (~has_direction).sum()}

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        queries, bank, zeros = _unit(features), self.fitted["bank"], int(self.fitted["zeros"])
        with _full_precision():
            squares = self._squared_distances(queries, bank, zeros)
            near = squares < _NEAR
            if bool(near.any()):
                finer = self._squared_distances(F.normalize(in_double(queries[near])), bank, zeros)
                squares[near] = finer.to(squares)
        # Those of features that are 0, from each other and from the others.
        squares[~queries.any(dim=1)] = 0.0 if zeros >= self.k else 1.0
        return squares.sqrt()

    def _squared_distances(self, queries: Tensor, bank: Tensor, zeros: int) -> Tensor:
        """Return those of unit vectors ``(B, D)`` to the k-th neighbour, ``(B,)``; what is 0 is ``zeros`` more rows."""
        count, extra = len(bank), min(zeros, self.k)
        columns = -(-(count + extra) // _BLOCK) * _BLOCK
        memory = self.max_memory or (2**25 if queries.device.type == "cpu" else 2**29)
        rows = max(1, memory // (columns * queries.element_size()))
        similarities = queries.new_empty(min(rows, len(queries)), columns)
        # A distance of 1; and what fills up the last block.
        similarities[:, count : count + extra] = 0.5
        similarities[:, count + extra :] = -torch.inf
        found = []
        for part in torch.split(queries, rows):
            own = similarities[: len(part)]
            _multiply(part, bank, own[:, :count])
            found.append(kth_largest(own, self.k))
        return (2.0 - 2.0 * torch.cat(found)).clamp_min_(0.0)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """Return the k-th largest number of each row.

    Every sixteenth of a row's columns is a block, by stride. The k blocks with the largest maxima hold the k largest
    numbers: any other number has k maxima above it. So only these blocks are searched.

    Args:
        values: ``(B, N)``, N a multiple of 16.
        k: In [1, N].

    Returns:
        ``(B,)``, exactly those numbers.

    Example:
        >>> kth_largest(torch.arange(64.0).reshape(1, 64), k=3)
        tensor([61.])
    """
    rows, columns = values.shape
    if columns // _BLOCK > k:
        blocks = values.view(rows, _BLOCK, columns // _BLOCK)
        best = blocks.amax(dim=1).topk(k, dim=1, sorted=False).indices
        values = blocks.gather(2, best[:, None].expand(-1, _BLOCK, -1)).flatten(1)
    return values.topk(k, dim=1, sorted=False).values.amin(dim=1)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, eps=_TINY)


def _multiply(queries: Tensor, bank: Tensor, out: Tensor) -> None:
    """Write the similarities; a bank of less precision is converted piece by piece."""
    if queries.dtype == bank.dtype:
        torch.mm(queries, bank.T, out=out)
        return
    for rows, columns in zip(torch.split(bank, _PIECE), torch.split(out, _PIECE, dim=1), strict=True):
        torch.mm(queries, F.normalize(rows.to(queries)).T, out=columns)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 matrices as such, not in the TF32 or bfloat16 that users choose for training."""
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = None  # set for each backend, which torch can since 2.9
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    coarse = [b for b in backends if getattr(b, "fp32_precision", "none") not in ("none", "ieee")]
    before = [backend.fp32_precision for backend in coarse]
    try:
        if legacy not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        else:
            for backend in coarse:
                backend.fp32_precision = "ieee"
        yield
    finally:
        if legacy not in (None, "highest"):
            torch.set_float32_matmul_precision(legacy)
        else:
            for backend, precision in zip(coarse, before, strict=True):
                backend.fp32_precision = precision
