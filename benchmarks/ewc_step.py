"""Time of a training step with the EWC penalty against a plain one: ResNet-20 through a Trainer.

Plain and penalised fits alternate, each pair in the other order than the one before; a second plain fit beside each
pair tells how far two equal fits are apart on this machine.

    python benchmarks/ewc_step.py --device cpu --steps 20 --pairs 5
"""

import argparse
import logging
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.backbones import resnet20
from lightning_bd.callbacks import ElasticWeightConsolidation


class Module(LightningModule):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet20(num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)


class Stopwatch(Callback):
    """Times the steps after the warm-up."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.times, self.start = warm_up, [0.0], 0.0
        self.times.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start."""
        _wait(pl_module.device)
        self.start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Stop."""
        _wait(pl_module.device)
        if batch_idx >= self.warm_up:
            self.times.append(time.perf_counter() - self.start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_time(strength: float | None, steps: int, batch_size: int, device: str) -> float:
    """Median time of a step in one fit; without the callback if ``strength`` is None."""
    torch.manual_seed(0)
    images, labels = torch.rand((steps + 3) * batch_size, 3, 32, 32), torch.randint(10, ((steps + 3) * batch_size,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size)
    stopwatch = Stopwatch(warm_up=3)
    callbacks: list[Callback] = []
    if strength is not None:
        old_task = [(images[:8], labels[:8])]
        callbacks.append(ElasticWeightConsolidation(strength=strength, dataloader=old_task))
    trainer = Trainer(
        # Last, so that the clock runs over the hooks of the others.
        callbacks=[*callbacks, stopwatch], max_epochs=1, accelerator="cpu" if device == "cpu" else "gpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader)
    return statistics.median(stopwatch.times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    times: dict[str, list[float]] = {"plain": [], "ewc": [], "plain again": []}
    runs = [("plain", None), ("ewc", 1.0), ("plain again", None)]
    for pair in range(arguments.pairs):
        for name, strength in runs if pair % 2 == 0 else runs[::-1]:
            times[name].append(step_time(strength, arguments.steps, arguments.batch_size, arguments.device))
    plain, ewc, again = (statistics.median(values) for values in times.values())
    print(f"device {arguments.device}, batch {arguments.batch_size}, {arguments.threads} threads")
    print(f"plain {plain * 1e3:.2f} ms, with EWC {ewc * 1e3:.2f} ms, ratio {ewc / plain:.3f}")
    print(f"control: plain / plain {again / plain:.3f}")


if __name__ == "__main__":
    main()
