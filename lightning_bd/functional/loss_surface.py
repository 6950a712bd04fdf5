"""Loss along lines and on planes in the space of a network's weights."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.functional.evaluation import Evaluation, evaluate
from lightning_bd.functional.modes import mode

__all__ = (
    "LinePoint",
    "SurfacePoint",
    "filter_normalized_directions",
    "interpolate_weights",
    "line",
    "recalibrate_batch_norm",
    "surface",
)


class LinePoint(NamedTuple):
    """Results by the name of the data at one position of a line: 0 is the first network, 1 the second."""

    position: float
    results: dict[str, Evaluation]


class SurfacePoint(NamedTuple):
    """Results by the name of the data at the weights plus ``alpha`` and ``beta`` times the two directions."""

    alpha: float
    beta: float
    results: dict[str, Evaluation]


def interpolate_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    r"""Weights on the straight line between two networks, :math:`(1 - t) \, \theta_A + t \, \theta_B`.

    If the loss stays low on the way the two lie in one basin (`Goodfellow et al., 2015
    <https://arxiv.org/abs/1412.6544>`_; `Frankle et al., 2020 <https://arxiv.org/abs/1912.05671>`_). Floating point
    tensors are interpolated, running statistics of BatchNorm too; others, such as ``num_batches_tracked``, are those
    of the nearer end (the second at 0.5). At 0 and 1 the ends come out bit for bit.

    Interpolated running statistics are not those of the interpolated network: far from the ends its activations shrink
    and its loss is overstated. :func:`recalibrate_batch_norm` measures them anew.

    Args:
        first: ``state_dict()`` of the network at 0.
        second: ``state_dict()`` of the network at 1.
        t: Position on the line, finite; below 0 and above 1 lie outside of the two, where a running variance may
            become negative.

    Returns:
        New tensors in the order of ``first``, for ``load_state_dict``.

    Raises:
        ValueError: If ``t`` is not finite, or the networks have other names, shapes or dtypes; the first one is named.

    Example:
        >>> first, second = {"weight": torch.tensor([0.0, 1.0])}, {"weight": torch.tensor([4.0, 1.0])}
        >>> interpolate_weights(first, second, 0.25)
        {'weight': tensor([1., 1.])}
    """
    if not abs(t) < float("inf"):
        raise ValueError(f"Expected argument `t` to be a finite float, but got {t}.")
    _check_same_network(first, second)
    # `lerp` computes from the nearer end, so that both ends are exact.
    return {
        name: torch.lerp(value, second[name].to(value.device), t)
        if value.is_floating_point()
        else (first if t < 0.5 else second)[name].clone()
        for name, value in first.items()
    }


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure the running statistics of BatchNorm layers anew, as plain averages over batches.

    The usual cure for averaged and interpolated weights (`Izmailov et al., 2018 <https://arxiv.org/abs/1803.05407>`_;
    `Jordan et al., 2022 <https://arxiv.org/abs/2211.08403>`_, who show how much of the barrier between two networks
    is due to the statistics). Clean training images in batches of equal size belong here: each batch counts the same.
    A network whose statistics were measured on poisoned data, too, is not quite the same network afterwards, and may
    obey its trigger less.

    Only BatchNorm layers are in training mode, and dropout is off, as when the network is evaluated.
    ``num_batches_tracked`` becomes the number of batches. Modes and momenta are put back, after an exception the
    statistics too; no gradient is computed.

    Args:
        model: Any module. Layers without running statistics are ignored.
        batches: Images ``(B, ...)`` on the model's device, B more than 1.

    Returns:
        How many layers have new statistics; without any, the images are not looked at.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> recalibrate_batch_norm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        1
        >>> model.running_mean, model.running_var
        (tensor([4.]), tensor([2.]))
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    if not layers:
        return 0
    before = [(layer.momentum, {name: buffer.clone() for name, buffer in layer.named_buffers()}) for layer in layers]
    with mode(model, training=False), torch.no_grad():
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative average
                layer.train()
            if not sum(model(images) is not None for images in batches):
                raise ValueError("Expected argument `batches` to hold at least one batch of images, but got none.")
        except BaseException:
            for layer, (_, buffers) in zip(layers, before, strict=True):
                for name, buffer in layer.named_buffers():
                    buffer.copy_(buffers[name])
            raise
        finally:
            for layer, (momentum, _) in zip(layers, before, strict=True):
                layer.momentum = momentum
    return len(layers)


def line(
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    positions: Sequence[float],
    data: Mapping[str, Sequence[Sequence[Tensor]]],
    calibration: Sequence[Tensor] | None = None,
) -> Iterator[LinePoint]:
    """Evaluate the networks on the line between two, one after the other.

    Whenever the caller has control, and after an exception, the model has the weights that it had before.

    Args:
        model: Takes the weights; its own do not matter.
        first: ``state_dict()`` at position 0.
        second: ``state_dict()`` at position 1.
        positions: Where to evaluate; see :func:`interpolate_weights`.
        data: Batches by name, such as ``{"clean": ..., "poisoned": ...}``; see :func:`evaluate`.
        calibration: Clean training images for :func:`recalibrate_batch_norm`, at each position, the ends included;
            None keeps interpolated running statistics, and with them the two networks as they are at the ends.

    Yields:
        One point for each position, in their order.

    Raises:
        ValueError: If the networks differ in names, shapes or dtypes, or a set of data is empty.

    Example:
        >>> model, data = nn.Linear(1, 2), {"clean": [(torch.ones(1, 1), torch.tensor([1]))]}
        >>> first, second = ({"weight": torch.zeros(2, 1), "bias": torch.tensor([x, 0.0])} for x in (-2.0, 2.0))
        >>> for point in line(model, first, second, (0, 0.5, 1), data):
        ...     print(point.position, f"{point.results['clean'].loss:.3f}")
        0 0.127
        0.5 0.693
        1 2.127
    """
    for position in positions:
        with _restored(model):
            model.load_state_dict(interpolate_weights(first, second, position))
            if calibration is not None:
                recalibrate_batch_norm(model, calibration)
            results = {name: evaluate(model, batches) for name, batches in data.items()}
        yield LinePoint(position, results)


def filter_normalized_directions(
    model: nn.Module, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Draw two random directions whose filters have the norms of the network's own.

    Gaussian noise in which each filter, :math:`d_i`, becomes :math:`\frac{d_i}{\lVert d_i \rVert} \lVert w_i \rVert`,
    so that a step of 1 is as large as the weights themselves and networks of different scales can be compared
    (`Li et al., 2018 <https://arxiv.org/abs/1712.09913>`_). A filter is a slice along a parameter's first dimension,
    and so a row of a linear layer's weight. Biases and normalisation parameters (one dimension or none) stay where they
    are. As in the paper the directions are not made orthogonal: with n weights their cosine is about
    :math:`1 / \sqrt{n}`.

    Args:
        model: Any module; its parameters are the origin of the directions.
        generator: A CPU generator.

    Returns:
        Two directions by parameter name, with the parameters' shapes, dtypes and devices.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> first, second = filter_normalized_directions(model, torch.Generator().manual_seed(0))
        >>> first["weight"].norm(), second["weight"].norm(), first["bias"]
        (tensor(5.), tensor(5.), tensor([0.]))
    """
    return _direction(model, generator), _direction(model, generator)


def surface(
    model: nn.Module,
    directions: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    alphas: Sequence[float],
    betas: Sequence[float],
    data: Mapping[str, Sequence[Sequence[Tensor]]],
) -> Iterator[SurfacePoint]:
    r"""Evaluate a network on a grid of the plane through its weights, :math:`\theta + \alpha d_1 + \beta d_2`.

    Running statistics of BatchNorm stay the network's own, as in `Li et al., 2018 <https://arxiv.org/abs/1712.09913>`_.
    Whenever the caller has control, and after an exception, the model has its own weights, bit for bit.

    Args:
        model: The network at the origin of the plane.
        directions: Of the plane, by parameter name, as :func:`filter_normalized_directions` draws them.
        alphas: Steps along the first direction.
        betas: Steps along the second one.
        data: Batches by name, such as ``{"clean": ..., "poisoned": ...}``; see :func:`evaluate`.

    Yields:
        ``len(alphas) * len(betas)`` points, all ``betas`` for the first of the ``alphas``, then for the second, ...

    Raises:
        ValueError: If the directions do not name the parameters of the model, or a set of data is empty.

    Example:
        >>> model, data = nn.Linear(1, 2, bias=False), {"clean": [(torch.ones(1, 1), torch.tensor([0]))]}
        >>> _ = nn.init.zeros_(model.weight)
        >>> directions = {"weight": torch.tensor([[1.0], [0.0]])}, {"weight": torch.tensor([[0.0], [1.0]])}
        >>> for point in surface(model, directions, (0, 1), (0, 1), data):
        ...     print(point.alpha, point.beta, f"{point.results['clean'].loss:.3f}")
        0 0 0.693
        0 1 1.313
        1 0 0.313
        1 1 0.693
    """
    parameters = dict(model.named_parameters())
    for direction in directions:
        if direction.keys() != parameters.keys():
            different = sorted(direction.keys() ^ parameters.keys())[0]
            raise ValueError(
                "Expected argument `directions` to name the parameters of the model, but"
                f" {'they lack' if different in parameters else 'the model has no'} `{different}`."
            )
    for alpha, beta in itertools.product(alphas, betas):
        with _restored(model), torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(directions[0][name], alpha=alpha).add_(directions[1][name], alpha=beta)
            results = {name: evaluate(model, batches) for name, batches in data.items()}
        yield SurfacePoint(alpha, beta, results)


def _direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    direction = {}
    for name, parameter in model.named_parameters():
        noise = torch.zeros(parameter.shape)
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            weight = parameter.detach().float().cpu()
            # Noise of norm zero cannot be drawn, but a filter may have no element.
            ratio = weight.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1).clamp_min(1e-10)
            noise *= ratio.reshape(-1, *[1] * (parameter.ndim - 1))
        direction[name] = noise.to(parameter)
    return direction


def _check_same_network(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    difference = None
    for name in (*first, *second):
        if name not in second or name not in first:
            difference = f"only the {'first' if name in first else 'second'} has `{name}`"
        elif first[name].shape != second[name].shape:
            shapes = tuple(first[name].shape), tuple(second[name].shape)
            difference = f"`{name}` has the shape {shapes[0]} in the first and {shapes[1]} in the second"
        elif first[name].dtype != second[name].dtype:
            difference = f"`{name}` is {first[name].dtype} in the first and {second[name].dtype} in the second"
        if difference:
            raise ValueError(f"Only weights of the same architecture can be interpolated, but {difference}.")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back parameters and buffers after the block, also after an exception."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
