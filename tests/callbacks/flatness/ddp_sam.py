"""Two processes train with SAM under DDP; the first writes the weights. Run by the test beside it."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks import SharpnessAwareMinimization

CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "sam": ({}, 1, {}),
    "sam accumulated": ({}, 2, {"gradient_as_bucket_view": True}),
    "m-sam": ({"sync_perturbation": False}, 1, {}),
    "m-sam accumulated": ({"sync_perturbation": False}, 2, {}),
    "gsam": ({"variant": "gsam", "alpha": 0.3}, 1, {"gradient_as_bucket_view": True}),
    "looksam": ({"variant": "looksam", "interval": 2}, 1, {"find_unused_parameters": True}),
}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator)


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, (arguments, accumulate, options) in CASES.items():
        callback = SharpnessAwareMinimization(rho=0.2, **arguments)
        module = Module()
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo", **options), max_epochs=1,
            accumulate_grad_batches=accumulate, callbacks=[callback], use_distributed_sampler=False, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        # Replica r takes batches r, r + 2, ...: six each.
        rank = trainer.global_rank
        images, labels = (column.view(12, 4, *column.shape[1:])[rank::2].flatten(0, 1) for column in make_data())
        trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=4))
        direction = list(callback.state_dict()["direction"].values())
        parts = [*module.net.parameters(), *direction]
        vector = torch.cat([part.detach().flatten() for part in parts])
        everywhere = trainer.strategy.all_gather(vector)
        assert isinstance(everywhere, Tensor)
        results[name] = {
            "state": module.net.state_dict(),
            "apart": (everywhere[0] - everywhere[1]).abs().max(),
            "direction": len(direction),
        }
    if rank == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
