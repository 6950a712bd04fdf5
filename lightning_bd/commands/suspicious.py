"""Pictures of what detectors find suspicious."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_bd.callbacks.detection.base import Detector, InputDetector
from lightning_bd.commands.score import Scores, Scoring, narrowed
from lightning_bd.datamodules.loader import BatchLoader
from lightning_bd.reports import suspicious_grid

__all__ = ("draw_explanations", "draw_suspicious")


def draw_suspicious(
    scoring: Scoring, scores: Scores, sets: Mapping[str, BatchLoader], folder: Path, count: int = 32
) -> None:
    """Draw the most suspicious images of each detector, all sets together, as ``suspicious_<detector>.png``.

    Args:
        scoring: Makes the images.
        scores: Detector -> set -> scores.
        sets: Name -> its images.
        folder: Where to write.
        count: Number of images.
    """
    for name, of_sets in scores.items():
        rows = [(float(s), each, int(i)) for each, known in of_sets.items()
                for s, i in zip(*_top(known.score, known.index, count), strict=True)]  # fmt: skip
        rows = sorted(rows, reverse=True)[:count]
        images = {
            (each, index): image
            for each in {each for _, each, _ in rows}
            for index, image in _images(scoring, sets[each], [i for _, other, i in rows if other == each])
        }
        pictures = torch.stack([images[each, index] for _, each, index in rows])
        captions = [f"{each} {score:.3g}" for score, each, _ in rows]
        suspicious_grid(pictures.numpy(), captions, folder / f"suspicious_{name}.png", f"Most suspicious to {name}")


def draw_explanations(
    scoring: Scoring,
    scores: Scores,
    detectors: Mapping[str, Detector],
    sets: Mapping[str, BatchLoader],
    folder: Path,
    count: int = 8,
) -> None:
    """Draw what detectors can show of why, such as masks, for the first images of each set.

    Args:
        scoring: Makes the images, and has the model.
        scores: Detector -> set -> scores.
        detectors: Name -> detector.
        sets: Name -> its images.
        folder: Where to write ``explained_<detector>.png``.
        count: Images per set.
    """
    for name, of_sets in scores.items():
        detector = detectors[name]
        if not isinstance(detector, InputDetector) or type(detector).explain is InputDetector.explain:
            continue
        pictures, captions = [], []
        for each in of_sets:
            loader = sets[each]
            chosen = loader.positions[:: max(1, len(loader.positions) // count)][:count].tolist()
            images = torch.stack([image for _, image in _images(scoring, loader, chosen)])
            shown = detector.explain(scoring.model, images.to(scoring.model.device))
            assert shown is not None
            shown = shown.cpu().expand_as(images)
            pictures += [images, shown]
            captions += [each] * len(images) + [name] * len(images)
        suspicious_grid(torch.cat(pictures).numpy(), captions, folder / f"explained_{name}.png", f"What {name} sees")


def _top(scores: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, places = scores.topk(min(count, len(scores)))
    return values, index[places]


def _images(scoring: Scoring, loader: BatchLoader, positions: list[int]) -> list[tuple[int, Tensor]]:
    found = []
    for raw, images, _, _ in scoring.batches(narrowed(loader, torch.tensor(positions)), "pictures"):
        found += list(zip(raw.indices.tolist(), images.float().cpu(), strict=True))
    return found
