"""Distances to the k-th neighbour against brute force in float64."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.detection import k_nearest_neighbors
from lightning_bd.callbacks.detection.k_nearest_neighbors import KNearestNeighbors, kth_largest


def rows(count: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def fitted(bank: Tensor, k: int, max_memory: int | None = None) -> KNearestNeighbors:
    detector = KNearestNeighbors(k=k, max_memory=max_memory)
    detector.fit(bank, torch.zeros(len(bank), 2), torch.zeros(len(bank), dtype=torch.long))
    return detector


def scores(detector: KNearestNeighbors, queries: Tensor) -> Tensor:
    return detector.score(queries, torch.zeros(len(queries), 2))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def brute_force(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Differences, not products: nothing cancels."""
    units, others = F.normalize(queries.double()), F.normalize(bank.double())
    return torch.stack([(others - unit).norm(dim=1).sort().values[k - 1] for unit in units])


@pytest.mark.parametrize(("count", "k"), [(300, 1), (300, 5), (301, 5), (319, 20), (300, 300), (50, 50), (17, 3)])
def test_is_brute_force(count: int, k: int) -> None:
    bank, queries = rows(count), rows(40, seed=1)
    found = scores(fitted(bank, k), queries)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), brute_force(queries, bank, k), rtol=0, atol=1e-6)


def test_agrees_with_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    bank, queries = rows(3000, width=64).relu(), rows(100, width=64, seed=1).relu()
    other = detectors.KNN(None, k=50).fit_features(bank, torch.zeros(3000, dtype=torch.long))
    torch.testing.assert_close(
        scores(fitted(bank, 50), queries).double(), other.predict_features(queries), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("width", [2, 512, 2048])
@pytest.mark.parametrize("k", [1, 3])
def test_near_duplicates(width: int, k: int) -> None:
    """Where 2 - 2 cos in float32 is off by up to 5e-4."""
    bank = rows(200, width)
    steps = torch.logspace(-6, 0, 100)
    queries = torch.cat([bank[:100], bank[:100] + steps[:, None] * rows(100, width, seed=1)])
    bank[100:200] = bank[:100] + 1e-3 * rows(100, width, seed=2)
    bank = torch.cat([bank, bank[:50]])
    found = scores(fitted(bank, k), queries).double()
    torch.testing.assert_close(found, brute_force(queries, bank, k), rtol=0, atol=5e-6)
    if k == 1:
        assert float(found[:100].max()) < 1e-7


def test_distances_just_above_the_float64_part() -> None:
    bank = rows(500, 512)
    queries = F.normalize(bank) + 0.0475 / 512**0.5 * rows(500, 512, seed=1)
    expected = brute_force(queries, bank, 1)
    assert float(expected.min()) > k_nearest_neighbors._NEAR**0.5 - 0.005
    torch.testing.assert_close(scores(fitted(bank, 1), queries).double(), expected, rtol=0, atol=8e-6)


@pytest.mark.parametrize("zeros", [0, 2, 3, 10])
def test_features_without_a_direction(zeros: int) -> None:
    bank, queries = torch.cat([rows(100), torch.zeros(zeros, 16)]), torch.cat([rows(20, seed=1), torch.zeros(2, 16)])
    for k in (3, 40, 100):
        found = scores(fitted(bank, k), queries)
        torch.testing.assert_close(found.double(), brute_force(queries, bank, k), rtol=0, atol=1e-6)


def test_bank_without_any_direction() -> None:
    assert scores(fitted(torch.zeros(4, 3), 2), torch.eye(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("columns", [16, 32, 320, 1600])
@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_kth_largest_is_that_of_a_sort(columns: int, k: int) -> None:
    generator = torch.Generator().manual_seed(columns + k)
    # Few different numbers, so that there are ties; and all large ones in one block.
    values = torch.randint(12, (30, columns), generator=generator).float()
    values[0] = 0.0
    values[0, :: columns // 16] = torch.arange(16.0)
    values[1, :16] = torch.arange(16.0) + 20
    assert torch.equal(kth_largest(values, k), values.sort(dim=1, descending=True).values[:, k - 1])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = rows(1000), torch.cat([rows(100, seed=1), rows(20)])
    expected = scores(fitted(bank, 5), queries)
    sizes = []
    multiply = k_nearest_neighbors._multiply

    def noting(part: Tensor, others: Tensor, out: Tensor) -> None:
        sizes.append(out.untyped_storage().nbytes())
        multiply(part, others, out)

    monkeypatch.setattr(k_nearest_neighbors, "_multiply", noting)
    torch.testing.assert_close(scores(fitted(bank, 5, max_memory=50_000), queries), expected, rtol=0, atol=1e-6)
    assert len(sizes) >= 10
    assert max(sizes) <= 50_000
    sizes.clear()
    # One query at a time at the least.
    torch.testing.assert_close(scores(fitted(bank, 5, max_memory=1), queries[:3]), expected[:3], rtol=0, atol=1e-6)
    assert sizes == [1008 * 4] * 3


def test_large_banks_are_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k_nearest_neighbors, "_PIECE", 7)
    bank = rows(100)
    found = scores(fitted(bank, 1), bank)
    torch.testing.assert_close(found, torch.zeros(100), rtol=0, atol=1e-7)


def test_batches_give_what_all_at_once_gives() -> None:
    bank, queries = rows(200), rows(30, seed=1)
    streaming = KNearestNeighbors(k=7)
    streaming.begin_fit()
    for part in torch.split(bank, 33):
        streaming.update_fit(part, torch.zeros(len(part), 2), torch.zeros(len(part), dtype=torch.long))
    streaming.finish_fit()
    assert torch.equal(scores(streaming, queries), scores(fitted(bank, 7), queries))


def test_lengths_labels_and_order_do_not_matter() -> None:
    bank, queries = rows(200), rows(30, seed=1)
    expected = scores(fitted(bank, 7), queries)
    lengths = 2.0 ** torch.randint(-40, 40, (200, 1), generator=torch.Generator().manual_seed(2))
    assert torch.equal(scores(fitted(bank * lengths, 7), queries * lengths[:30]), expected)
    torch.testing.assert_close(scores(fitted(bank.flip(0), 7), queries), expected, rtol=0, atol=1e-6)
    unlabelled = KNearestNeighbors(k=7)
    unlabelled.fit(bank, torch.zeros(200, 2), torch.full((200,), -1))
    assert torch.equal(scores(unlabelled, queries), expected)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_users_matmul_precision_is_put_back(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    detector = fitted(rows(50), 3)
    seen = []
    multiply = k_nearest_neighbors._multiply

    def noting(part: Tensor, others: Tensor, out: Tensor) -> None:
        seen.append(torch.get_float32_matmul_precision())
        multiply(part, others, out)
        if len(seen) == 2:
            raise ArithmeticError

    monkeypatch.setattr(k_nearest_neighbors, "_multiply", noting)
    with matmul_precision(precision):
        scores(detector, rows(2, seed=1))
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ArithmeticError):
            scores(detector, rows(2, seed=1))
        assert torch.get_float32_matmul_precision() == precision
    assert seen == ["highest", "highest"]


def test_matmul_precision_that_is_set_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the interface since torch 2.9, which makes the older one fail."""
    cuda = torch.backends.cuda.matmul
    if not hasattr(cuda, "fp32_precision"):
        pytest.skip("needs torch 2.9")
    detector = fitted(rows(50), 3)
    seen = []
    multiply = k_nearest_neighbors._multiply

    def noting(part: Tensor, others: Tensor, out: Tensor) -> None:
        seen.append(cuda.fp32_precision)
        multiply(part, others, out)

    monkeypatch.setattr(k_nearest_neighbors, "_multiply", noting)
    with matmul_precision("highest"):
        before, cuda.fp32_precision = cuda.fp32_precision, "tf32"
        try:
            scores(detector, rows(2, seed=1))
            assert cuda.fp32_precision == "tf32"
        finally:
            cuda.fp32_precision = before
    assert seen == ["ieee"]


def test_state_travels() -> None:
    detector, other = fitted(rows(100), 4), KNearestNeighbors(k=4)
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    queries = rows(20, seed=1)
    assert torch.equal(scores(other, queries), scores(detector, queries))
    assert scores(other, queries[:0]).shape == (0,)


def test_no_gradient_is_kept() -> None:
    assert not fitted(rows(10).requires_grad_(), 2).fitted["bank"].requires_grad


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `k` to be a positive integer, but got 0\."):
        KNearestNeighbors(k=0)
    with pytest.raises(
        ValueError, match=r"Expected argument `max_memory` to be a positive integer or None, but got 0\."
    ):
        KNearestNeighbors(max_memory=0)
    with pytest.raises(ValueError, match=r"Expected at least `k` images to fit on, but got 9 for k = 10"):
        fitted(rows(9), 10)
    detector = KNearestNeighbors()
    detector.begin_fit()
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        detector.finish_fit()
    with pytest.raises(ValueError, match="but got 0 for k = 1"):
        fitted(rows(0), 1)
    with pytest.raises(RuntimeError, match="has to be fitted before it can score"):
        scores(KNearestNeighbors(), rows(1))
