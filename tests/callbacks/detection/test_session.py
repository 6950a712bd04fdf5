"""A session of several detectors: who is remembered as fitted, and what that costs."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection import session
from lightning_bd.callbacks.detection.base import InputDetector
from lightning_bd.callbacks.detection.session import ScoringSession
from lightning_bd.functional.digest import weights_sha256


class Fitted(InputDetector):
    name = "fitted"
    needs_fit = True

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.fits = 0

    def _fit(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        self.fits += 1
        if self.fails:
            raise ValueError("cannot be fitted")
        return {"count": torch.tensor(float(sum(len(images) for images, _ in batches)))}

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def data(_: object) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64))]


def test_who_failed_is_not_taken_for_fitted() -> None:
    model, good, bad = network(), Fitted(), Fitted(fails=True)
    failed: list[object] = []
    for _ in range(2):
        both = ScoringSession(model, [bad, good], on_failure=lambda detector, _: failed.append(detector))
        both.fit(data, origin=model)
        assert both.detectors == (good,)
    assert failed == [bad, bad]
    # The one that had been fitted was not fitted again, the other was tried again.
    assert (good.fits, bad.fits) == (1, 2)


def test_weights_are_digested_once_for_all_detectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = network(), 0

    def counted(state: dict[str, object]) -> str:
        nonlocal calls
        calls += 1
        return weights_sha256(state)

    monkeypatch.setattr(session, "weights_sha256", counted)
    detectors = [Fitted() for _ in range(5)]
    ScoringSession(model, detectors).fit(data)
    assert calls == 1
    with torch.no_grad():
        next(model.parameters()).add_(1)
    ScoringSession(model, detectors).fit(data)
    assert [detector.fits for detector in detectors] == [2] * 5
