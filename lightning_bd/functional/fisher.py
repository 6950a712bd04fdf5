"""Diagonal of the Fisher information of a classifier."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.layer_squares import in_parts
from lightning_bd.functional.modes import mode
from lightning_bd.functional.per_sample import SquaredGradients

__all__ = ("FisherKind", "fisher_diagonal", "fisher_sums")

FisherKind = Literal["empirical", "exact", "sampled", "weighted"]


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    kind: FisherKind = "empirical",
    *,
    num_samples: int | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Mean over samples of the squared gradient of the log-likelihood, for each parameter.

    .. math::
        F_i = \frac{1}{N} \sum_{n=1}^{N} \sum_y w_n(y)
              \left(\frac{\partial \log p(y | x_n)}{\partial \theta_i}\right)^2

    The gradient is squared for each sample by itself, never after a mean over a batch. With :math:`y_n` the label in
    the data, the weights :math:`w_n(y)` are

    - ``"empirical"``: 1 for :math:`y_n`, else 0;
    - ``"exact"``: :math:`p(y | x_n)`, the expectation over the model's own labels and so the diagonal of the Fisher
      information; one backward pass for each class;
    - ``"sampled"``: 1 for one label drawn from :math:`p(y | x_n)`, else 0; the same in expectation;
    - ``"weighted"``: :math:`p(y_n | x_n)` for :math:`y_n`, else 0. The released code of `Flatness-aware Sequential
      Learning <https://arxiv.org/abs/2407.14738>`_ weights so; it divides by about twice the number of samples, which
      is not reproduced: here N is their number.

    `Kunstner et al., 2019 <https://arxiv.org/abs/1905.12558>`_ tell the empirical from the exact Fisher information.
    The model is evaluated in evaluation mode and left as it was: weights, buffers, ``.grad``, flags and hooks. The
    global random state is not advanced. Memory does not grow with the number of samples.

    Args:
        model: Maps images ``(B, ...)`` to logits ``(B, C)``, each sample for itself.
        batches: Batches on the model's device; ``batch[0]`` are the images, ``batch[1]`` the labels ``(B,)``, int64.
        kind: Which labels are taken and how their squares are weighted.
        num_samples: Stop after so many samples, positive; None takes all batches.
        chunk_size: Samples that are propagated together, positive. None: 32 on a CPU, 128 elsewhere.
        max_memory: Bytes that the per-sample gradients of one layer may take, positive; see
            :class:`~lightning_bd.functional.per_sample.SquaredGradients`. It changes the result by rounding at most.
        generator: CPU generator for ``"sampled"``; None draws the same labels in each call.

    Returns:
        The diagonal by parameter name, for the parameters that require a gradient; float32, or float64 for float64
        parameters.

    Raises:
        ValueError: If an argument is out of range, there is no sample, logits or labels have another shape, or a
            ``BatchNorm`` layer has no running statistics.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> fisher_diagonal(model, [(torch.tensor([[2.0]]), torch.tensor([1]))])
        {'weight': tensor([[1.],
                [1.]])}
    """
    sums, count = fisher_sums(
        model,
        batches,
        kind,
        num_samples=num_samples,
        chunk_size=chunk_size,
        max_memory=max_memory,
        generator=generator,
    )
    if count == 0:
        raise ValueError("Expected argument `batches` to hold at least one sample, but got none.")
    return {name: total.div_(count) for name, total in sums.items()}


def fisher_sums(
    model: nn.Module,
    batches: Iterable[Any],
    kind: FisherKind = "empirical",
    *,
    num_samples: int | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Numerator and denominator of :func:`fisher_diagonal`, to be added up over processes before the division.

    Args:
        model: As for :func:`fisher_diagonal`, and so are all others.
        batches: Batches on the model's device; they may be none.
        kind: Which labels are taken and how their squares are weighted.
        num_samples: Stop after so many samples; 0 takes none.
        chunk_size: Samples that are propagated together.
        max_memory: Bytes that the per-sample gradients of one layer may take.
        generator: CPU generator for ``"sampled"``.

    Returns:
        The sums of squares by parameter name, and the number of samples.

    Raises:
        ValueError: If an argument is out of range, or logits or labels have another shape.

    Example:
        >>> sums, count = fisher_sums(nn.Linear(1, 2), [(torch.ones(3, 1), torch.tensor([0, 1, 1]))])
        >>> count, list(sums)
        (3, ['weight', 'bias'])
    """
    if kind not in get_args(FisherKind):
        raise ValueError(f"Expected argument `kind` to be one of {get_args(FisherKind)}, but got {kind!r}.")
    if num_samples is not None and num_samples < 0:
        raise ValueError(
            f"Expected argument `num_samples` to be a non-negative integer or None, but got {num_samples}."
        )
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"Expected argument `chunk_size` to be a positive integer or None, but got {chunk_size}.")
    generator = generator or keyed_generator("fisher")
    squares = SquaredGradients(model, max_memory)
    count = 0
    with _untouched(model):
        for images, labels in _chunks(batches, num_samples, chunk_size):
            squares.add(images, partial(_cotangents, labels=labels, kind=kind, generator=generator))
            count += len(images)
    return squares.sums, count


def _chunks(batches: Iterable[Any], num_samples: int | None, chunk_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    left = num_samples
    if left == 0:
        return
    for batch in batches:
        images, labels = batch[0][:left], batch[1][:left]
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"Expected labels of shape ({len(images)},), one for each image, but got {tuple(labels.shape)}."
            )
        size = chunk_size or (32 if images.device.type == "cpu" else 128)
        yield from in_parts(images, labels, size)
        if left is not None:
            left -= len(images)
            if left == 0:
                return


def _cotangents(logits: Tensor, labels: Tensor, kind: FisherKind, generator: torch.Generator) -> Iterator[Tensor]:
    """Gradients of the negative log-likelihood with respect to the logits, times the square root of the weight."""
    if logits.ndim != 2:
        raise ValueError(f"Expected `model` to return logits of shape (B, C), but got {tuple(logits.shape)}.")
    dtype = logits.dtype
    probabilities = logits.to(torch.promote_types(dtype, torch.float32)).softmax(1)
    if kind == "exact":
        for label in range(logits.shape[1]):
            direction = probabilities.clone()
            direction[:, label] -= 1
            yield (direction * probabilities[:, label : label + 1].sqrt()).to(dtype)
        return
    if kind == "sampled":
        draws = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(probabilities)
        labels = (probabilities.cumsum(1) <= draws).sum(1).clamp_(max=logits.shape[1] - 1)
    labels = labels.long()[:, None]
    direction = probabilities.scatter_add(1, labels, -torch.ones_like(probabilities))
    if kind == "weighted":
        direction *= probabilities.gather(1, labels).sqrt()
    yield direction.to(dtype)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model`` inside the block; put back modes, buffers and the random state, also after an exception."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators), mode(model, training=False):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    setattr(module, name, buffer)
                    buffer.copy_(value)
