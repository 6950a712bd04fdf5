"""Pruning the channels whose score stands out in their layer: what defenses share that differ in the score."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from lightning_bd.callbacks.defense.base import DefenderData, Report
from lightning_bd.callbacks.defense.pruning import silence
from lightning_bd.callbacks.defense.training import clean_accuracy
from lightning_bd.functional.channel_statistics import outliers
from lightning_bd.functional.modes import mode

__all__ = ("check_thresholds", "is_prunable", "prune_outliers", "watch_inputs")

_NO_IMAGES = "The defender has no training images: give the phase a larger split."


def check_thresholds(u: float | Sequence[float], max_drop: float) -> tuple[float, ...]:
    """Return the candidates for the threshold, the smallest first.

    Args:
        u: Standard deviations above a layer's mean, at least 0; one or several.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1].

    Raises:
        ValueError: If an argument is out of its range.
    """
    candidates = tuple(u) if isinstance(u, Sequence) else (u,)
    if not candidates or not all(candidate >= 0 for candidate in candidates):
        raise ValueError(f"Expected argument `u` to be a non-negative float or several of them, but got {u}.")
    if not 0 <= max_drop <= 1:
        raise ValueError(f"Expected argument `max_drop` to be in [0, 1], but got {max_drop}.")
    return tuple(sorted(float(candidate) for candidate in candidates))


def is_prunable(layer: _BatchNorm) -> bool:
    """Return whether a channel may be silenced by the layer's weights: it has some, and they are not frozen."""
    return layer.affine and all(parameter.requires_grad for parameter in layer.parameters(recurse=False))


@torch.no_grad()
def watch_inputs(
    model: nn.Module, data: DefenderData, layers: Mapping[str, _BatchNorm], see: Callable[[str, Tensor], None]
) -> None:
    """Show what goes into layers, in evaluation mode, for each batch of the first training epoch.

    Args:
        model: The model; modes and hooks are put back.
        data: The defender's data.
        layers: The layers to watch, by name.
        see: Gets a layer's name and its input ``(B, C, ...)``.

    Raises:
        MisconfigurationException: If there are no training images.
    """

    def show(_: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        see(name, inputs[0])

    handles = [layer.register_forward_pre_hook(partial(show, name=name)) for name, layer in layers.items()]
    batches = 0
    try:
        # A compiled module would not call the hooks of its parts.
        with mode(model, training=False), torch.compiler.set_stance("force_eager"):
            for images, _ in tqdm(data.train(0), "measuring channels", disable=not data.show_progress, leave=False):
                with data.forward_context():
                    model(images)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise MisconfigurationException(_NO_IMAGES)


def prune_outliers(
    model: nn.Module,
    data: DefenderData,
    scores: Mapping[str, tuple[_BatchNorm, Tensor]],
    candidates: Sequence[float],
    max_drop: float,
) -> Report:
    """Silence the channels whose score exceeds the mean of their layer by ``u`` standard deviations.

    Of several candidates the smallest ``u``, which prunes most, is taken whose clean validation accuracy drops by at
    most ``max_drop``; if none qualifies, the largest, and the report and a warning say so. A single one is taken as it
    is, and the validation images are not looked at.

    Args:
        model: The model; changed in place.
        data: The defender's data.
        scores: By name the layers whose channels may be silenced, and their scores ``(C,)``: higher is more
            suspicious, NaN is never pruned.
        candidates: Values of ``u``, ascending.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1].

    Returns:
        ``pruned`` and ``channels``, the number that was and that could be pruned, ``pruned/<layer>`` for each layer,
        and the ``u`` taken.
    """
    choose = len(candidates) > 1
    before = after = clean_accuracy(model, data) if choose else math.nan
    start = {name: {k: v.clone() for k, v in layer.state_dict().items()} for name, (layer, _) in scores.items()}
    pruned: dict[str, int] = {}

    def restore() -> None:
        for name, (layer, _) in scores.items():
            layer.load_state_dict(start[name])

    try:
        for u in candidates:
            # All are restored before any is pruned: two convolutions may share one normalisation.
            restore()
            for name, (layer, score) in scores.items():
                found = outliers(score, u).nonzero().flatten()
                silence(layer, found)
                pruned[name] = len(found)
            if not choose:
                break
            after = clean_accuracy(model, data)
            if kept := before - after <= max_drop + 1e-9:  # 0.98 - 0.97 is a little more than 0.01
                break
    except BaseException:
        restore()
        raise
    total, channels = sum(pruned.values()), sum(len(score) for _, score in scores.values())
    values = {"u": u, "pruned": float(total), "channels": float(channels)}
    values |= {f"pruned/{name}": float(count) for name, count in pruned.items()}
    note = f"pruned {total} of {channels} channels"
    if not total:
        note += ": no channel exceeded the threshold"
    if choose:
        values |= {"validation_accuracy_before": before, "validation_accuracy": after}
        note += f", u {u:g}"
        if not kept:
            note += f", yet {100 * (before - after):.1f} points of validation accuracy lost"
            warnings.warn(f"Pruning lost more than {max_drop:g} of clean accuracy at every `u`.", stacklevel=3)
    return Report(values=values, note=note)
