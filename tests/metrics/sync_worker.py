"""One process of the synchronisation test: ``python sync_worker.py RANK WORLD_SIZE FOLDER``."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_bd.metrics import AttackSuccessRate, AttackSuccessRateAll, RobustAccuracy


def main(rank: int, world_size: int, folder: Path) -> None:
    """Count this process's images and write what the synchronised metrics compute."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    try:
        # The last process holds images of the target class only: its own rate would be NaN.
        original = torch.tensor([[0, 1, 2, 3, 1], [0, 0, 0, 0, 0]][rank])
        target = torch.zeros_like(original)
        preds = torch.tensor([[0, 0, 2, 0, 1], [0, 0, 0, 3, 0]][rank])
        results = {}
        for metric in (AttackSuccessRate(), AttackSuccessRateAll(), RobustAccuracy()):
            metric.update(preds, target, original)
            results[type(metric).__name__] = metric.compute().item()
        (folder / f"{rank}.json").write_text(json.dumps(results))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
