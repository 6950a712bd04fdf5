"""Frozen running statistics against layers that are left alone."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bd.functional.batch_norm import frozen_running_stats


def make(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2, momentum=momentum),
        nn.Flatten(),
        nn.BatchNorm1d(32, momentum=momentum, affine=False),
        nn.SyncBatchNorm(32),
        nn.BatchNorm1d(32, track_running_stats=False),
    )


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def settings(model: nn.Module) -> list[tuple[object, object]]:
    return [(layer.momentum, layer.track_running_stats) for layer in model.modules() if hasattr(layer, "momentum")]


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_statistics_stay_and_batches_are_normalised_as_ever(momentum: float | None) -> None:
    # The synchronised layer trains on accelerators only.
    model, plain = make(momentum)[:4], make(momentum)[:4]
    x = torch.randn(8, 1, 6, 6)
    before, kept = statistics(model), settings(model)
    with frozen_running_stats(model):
        output = model(x)
    assert torch.equal(output, plain(x))
    assert all(torch.equal(before[name], buffer) for name, buffer in statistics(model).items())
    assert any(not torch.equal(before[name], buffer) for name, buffer in statistics(plain).items())
    assert settings(model) == kept
    model(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_evaluation_uses_the_running_statistics() -> None:
    model = make().eval()
    x = torch.randn(8, 1, 6, 6) + 3
    expected = model(x)
    with frozen_running_stats(model):
        assert torch.equal(model(x), expected)


def test_infinite_batches_leave_no_trace() -> None:
    layer = nn.BatchNorm1d(2)
    with frozen_running_stats(layer):
        layer(torch.full((3, 2), torch.inf))
    assert torch.isfinite(torch.cat([layer.running_mean, layer.running_var])).all()  # type: ignore[list-item]


def test_settings_are_put_back_after_an_exception_and_nest() -> None:
    model = make()
    kept = settings(model)
    with pytest.raises(RuntimeError, match="inside"), frozen_running_stats(model), frozen_running_stats(model[1]):
        raise RuntimeError("inside")
    assert settings(model) == kept
    with frozen_running_stats(model):
        with frozen_running_stats(model):
            pass
        assert not any(flag for _, flag in settings(model))
    assert settings(model) == kept


def test_other_layers_are_left_alone() -> None:
    layer = nn.InstanceNorm1d(2, track_running_stats=True)
    with frozen_running_stats(layer):
        assert layer.track_running_stats
