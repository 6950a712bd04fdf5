"""Cost of a SAM step beside a plain step, through the Trainer.

Both run in one process, in pairs whose order alternates; the median of the ratios is printed, and beside it that of
plain against plain, which shows how far the clock of this machine can be trusted.

Run: ``python benchmarks/sam_step.py --pairs 15 --batch-size 128 --steps 8``.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.backbones import resnet20
from lightning_bd.callbacks import SharpnessAwareMinimization


class Classifier(LightningModule):
    """ResNet-20 on noise in the shape of CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet20(num_classes=10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of images in [0, 1], (B, 3, 32, 32)."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Stopwatch(Callback):
    """Seconds from the end of the first step, which warms up, to the end of the last."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds = 0.0

    def on_train_batch_end(self, *hook: object) -> None:
        """Start or stop."""
        batch_idx = hook[-1]
        if batch_idx in (0, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds


def measure(callbacks: list[Callback], batch_size: int, steps: int, accelerator: str) -> float:
    """Fit for ``steps`` steps after one to warm up and return the seconds per step."""
    stopwatch = Stopwatch(steps)
    count = batch_size * (steps + 1)
    data = TensorDataset(torch.rand(count, 3, 32, 32), torch.randint(10, (count,)))
    trainer = Trainer(
        callbacks=[*callbacks, stopwatch], max_epochs=1, accelerator=accelerator, devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(data, batch_size=batch_size))
    return stopwatch.seconds / steps


def show(name: str, quotients: list[float]) -> None:
    """Print median and quartiles."""
    low, middle, high = statistics.quantiles(quotients, n=4, method="inclusive")
    print(f"{name:24s} median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


def main() -> None:
    """Print one line for the variant, one for the control and the time of a plain step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="at least 2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each run, after one to warm up")
    parser.add_argument("--variant", choices=["sam", "asam", "gsam", "looksam"], default="sam")
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    variant: Literal["sam", "asam", "gsam", "looksam"] = arguments.variant

    def plain() -> float:
        return measure([], arguments.batch_size, arguments.steps, arguments.accelerator)

    def sharp() -> float:
        callback = SharpnessAwareMinimization(variant=variant)
        return measure([callback], arguments.batch_size, arguments.steps, arguments.accelerator)

    plain(), sharp()
    baseline: list[float] = []
    other: list[float] = []
    control: list[float] = []
    for pair in range(arguments.pairs):
        runs = [(baseline, plain), (other, sharp), (control, plain)]
        for times, run in reversed(runs) if pair % 2 else runs:
            times.append(run())
    show(f"{variant} / plain", [b / a for a, b in zip(baseline, other, strict=True)])
    show("plain / plain (control)", [b / a for a, b in zip(baseline, control, strict=True)])
    print(f"plain step: median {1000 * statistics.median(baseline + control):.1f} ms")


if __name__ == "__main__":
    main()
