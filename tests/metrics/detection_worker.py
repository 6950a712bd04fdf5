"""One process of the detection metrics' synchronisation test: ``python detection_worker.py RANK WORLD_SIZE FOLDER``."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_bd.metrics.detection import (
    DetectionAUROC,
    DetectionAveragePrecision,
    DetectionMetrics,
    FalsePositiveRate,
    TruePositiveRate,
)


def main(rank: int, world_size: int, folder: Path) -> None:
    """Keep this process's scores and write what the synchronised metrics compute."""
    scores, positives = (torch.tensor(part) for part in json.loads((folder / "images.json").read_text()))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    try:
        results: dict[str, float] = {}
        # Shares: of different sizes, the first of one kind of image only; and all of it on the first process.
        for name, cut in (("shared", 7), ("alone", len(scores))):
            own = slice(cut) if rank == 0 else slice(cut, None)
            for metric in (
                DetectionAUROC(),
                DetectionAveragePrecision(positive="in"),
                FalsePositiveRate(positive="in"),
                TruePositiveRate(fpr=0.2),
                DetectionMetrics(),
            ):
                if len(scores[own]):
                    for batch in zip(torch.split(scores[own], 5), torch.split(positives[own], 5), strict=True):
                        metric.update(*batch)
                else:
                    metric._update_count = 1  # what silences the warning of a metric without updates
                values = metric.compute()
                values = values if isinstance(values, dict) else {"value": values}
                results |= {f"{name}/{type(metric).__name__}/{key}": value.item() for key, value in values.items()}
                # The process's own images are back.
                assert sum(len(part) for part in metric.scores) == len(scores[own])
        (folder / f"{rank}.json").write_text(json.dumps(results))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
