"""One of several processes: fits and scores its part of the data, and writes what it found."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks import ClassTypicalMatching, DatasetDetector, Detector, KNearestNeighbors


class Model(LightningModule):
    """A fixed classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


class FromMean(DatasetDetector):
    """Distance to the mean of all images."""

    name = "from_mean"

    def _score(self, features: Tensor, labels: Tensor) -> Tensor:
        distances: Tensor = (features - features.mean(0)).norm(dim=1)
        return distances


def data(count: int, seed: int) -> TensorDataset:
    """Two classes in 4 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    return TensorDataset(torch.randn(count, 4, generator=generator) + 2 * labels[:, None], labels)


def main(folder: Path, processes: int) -> None:
    """Test with two detectors."""
    # No sampler: each process is to take its share all the same.
    loader = DataLoader(data(40, 1), batch_size=4)
    detectors: list[Detector] = [
        ClassTypicalMatching(dataloader=loader, only_correct=False),
        KNearestNeighbors(k=3, dataloader=loader),
        FromMean(),
    ]
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*detectors],
    )  # fmt: skip
    # An odd number: a sampler repeats an image, which must not count twice.
    sets = {"id": DataLoader(data(11, 2), batch_size=4), "far": DataLoader(data(8, 3), batch_size=4)}
    (logged, *_) = trainer.test(Model(), dataloaders=sets, verbose=False)
    if trainer.is_global_zero:
        scores = {d.name: {name: (s.index, s.score) for name, s in d.scores.items()} for d in detectors}
        torch.save({"logged": logged, "scores": scores}, folder / f"{processes}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
