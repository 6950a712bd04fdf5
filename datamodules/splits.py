"""Cutting a training set into disjoint parts, stratified by class."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_bd.functional.draws import keyed_generator

__all__ = ("stratified_splits", "stratified_subset")


def stratified_splits(labels: Tensor, fractions: Mapping[str, float], seed: int = 0) -> dict[str, Tensor]:
    """Cut positions ``0 .. N - 1`` into disjoint splits with the same share of every class.

    Args:
        labels: ``(N,)`` int64.
        fractions: Share of the images per split, each in (0, 1], at most 1 together.
        seed: Seed of the cut, its own, so that the splits stay when another seed changes.

    Returns:
        Sorted positions per split.

    Raises:
        ValueError: If there is no split, a share is outside (0, 1], the shares sum to more than 1, or a split gets no
            image of a class.

    Example:
        >>> splits = stratified_splits(torch.arange(20) % 2, {"inject": 0.8, "defend": 0.2})
        >>> [len(part) for part in splits.values()]
        [16, 4]
    """
    if not fractions:
        raise ValueError("Expected `splits` to name at least one split, but got none.")
    for name, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ValueError(f"Expected split `{name}` to be a share in (0, 1], but got {fraction}.")
    total = sum(fractions.values())
    if total > 1 + 1e-9:
        raise ValueError(f"Expected `splits` to sum to at most 1, but got {total:g}: {dict(fractions)}.")
    parts: dict[str, list[Tensor]] = {name: [] for name in fractions}
    for label in labels.bincount().nonzero().flatten().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=keyed_generator(seed, "split", label))]
        share = 0.0
        for name, fraction in fractions.items():
            start, stop = round(share * len(members)), round((share + fraction) * len(members))
            if start == stop:
                raise ValueError(
                    f"Expected every split to hold every class, but split `{name}` ({fraction:g}) gets no image of "
                    f"class {label}, which has {len(members)}. Raise its share or use more images."
                )
            parts[name].append(members[start:stop])
            share += fraction
    return {name: torch.cat(chunks).sort().values for name, chunks in parts.items()}


def stratified_subset(labels: Tensor, size: int, seed: int = 0, name: str = "subset") -> Tensor:
    """Choose ``size`` positions with the classes in proportion, to within one image each.

    Args:
        labels: ``(N,)`` int64.
        size: How many, in [1, N].
        seed: Seed of the choice.
        name: What the caller calls ``size``, for the message.

    Returns:
        ``(size,)`` sorted positions.

    Raises:
        ValueError: If ``size`` is not in [1, N].

    Example:
        >>> labels = torch.arange(100) % 10
        >>> labels[stratified_subset(labels, 20)].bincount().tolist()
        [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    if not 1 <= size <= len(labels):
        raise ValueError(f"Expected argument `{name}` to be in [1, {len(labels)}], but got {size}.")
    # Every image gets its rank within its class, shuffled, divided by the class size: the smallest values are in
    # proportion to the classes.
    order = torch.randperm(len(labels), generator=keyed_generator(seed, "subset"))
    shuffled = labels[order]
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.bincount().nonzero().flatten().tolist():
        members = (shuffled == label).nonzero().flatten()
        rank[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return order[rank.argsort(stable=True)[:size]].sort().values
