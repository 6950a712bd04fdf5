"""A training step through the framework against a hand-written PyTorch loop.

Same network, data in memory, optimizer, crops, mirrors and dynamic trigger; the loop is what a careful user writes
without any framework. A second run of the loop beside each pair is the A/A control.

    python benchmarks/training_step.py                                            # small_cnn on the CPU
    python benchmarks/training_step.py --backbone linear --pairs 40               # the overhead itself
    python benchmarks/training_step.py --backbone resnet18 --device cuda --precision bf16-mixed
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from _pairs import alternate, report
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.backbones import resnet18, small_cnn
from lightning_bd.callbacks import SharpnessAwareMinimization
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.datamodules import ImageDataModule
from lightning_bd.datamodules.augmentation import crop_and_flip
from lightning_bd.datamodules.images import TensorImages
from lightning_bd.phases import MultiPhaseTrainer, Phase
from lightning_bd.poisoning import Poison
from lightning_bd.quiet import quiet
from lightning_bd.triggers import BadNets


class Noise(ImageDataModule):
    """Random images in the shape of CIFAR-10."""

    count = 0

    def load(self, train: bool) -> TensorImages:
        """Return the images; a handful for the test set."""
        count = self.count if train else 20
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return TensorImages(images, torch.arange(count) % 10, [str(i) for i in range(10)])


class Stopwatch(Callback):
    """Seconds per step from the end of the warm-up to the end of the epoch."""

    def __init__(self, warm_up: int, device: str) -> None:
        self.warm_up, self.device = warm_up, device
        self.start = self.seconds = 0.0
        self.steps = 0

    def on_train_batch_end(self, *hook: object) -> None:
        """Start the clock after the warm-up."""
        if hook[-1] == self.warm_up - 1:
            _wait(self.device)
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        _wait(self.device)
        self.seconds = (time.perf_counter() - self.start) / (trainer.num_training_batches - self.warm_up)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_network(name: str) -> nn.Module:
    """Build a network from the same seed each time."""
    torch.manual_seed(0)
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    return resnet18(num_classes=10) if name == "resnet18" else small_cnn(num_classes=10, width=16)


def framework(arguments: argparse.Namespace, poison: Poison) -> float:
    """Seconds per step of a phase of MultiPhaseTrainer."""
    watch = Stopwatch(arguments.warm_up, arguments.device)
    data = Noise(poison, batch_size=arguments.batch_size)
    data.count = arguments.batch_size * (arguments.warm_up + arguments.steps)
    model = BackdoorClassifier(make_network(arguments.backbone), 10, channels_last=arguments.channels_last,
                               compile=arguments.compile)  # fmt: skip
    optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    callbacks: list[Callback] = [SharpnessAwareMinimization(), watch] if arguments.sam else [watch]
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = MultiPhaseTrainer(
            phases=[Phase("train", poisoned=True, max_epochs=1, optimizer=optimizer, callbacks=callbacks)],
            default_root_dir=Path(folder), accelerator="gpu" if arguments.device == "cuda" else "cpu", devices=1,
            precision=arguments.precision, enable_progress_bar=False, logger=arguments.logger,
        )  # fmt: skip
        trainer.show_results = False
        trainer.fit(model, datamodule=data)
    return watch.seconds


def loop(arguments: argparse.Namespace, poison: Poison) -> float:
    """Seconds per step of the hand-written loop."""
    device, size = torch.device(arguments.device), arguments.batch_size
    count = size * (arguments.warm_up + arguments.steps)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    model = make_network(arguments.backbone).to(device)
    if arguments.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if arguments.compile:
        model.compile()
    trigger = poison.trigger.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = 0.0

    def move(tensor: Tensor) -> Tensor:
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    def batch(chosen: Tensor) -> tuple[Tensor, Tensor]:
        offsets = torch.randint(0, 9, (len(chosen), 2), generator=generator)
        flips = torch.rand(len(chosen), generator=generator) < 0.5
        rows = (torch.rand(len(chosen), generator=generator) < poison.rate).nonzero().flatten()
        rows, y = move(rows), move(labels[chosen])
        x = crop_and_flip(move(images[chosen]), move(offsets), move(flips), 4).float().div_(255)
        x.index_copy_(0, rows, trigger(x[rows]))
        y.index_fill_(0, rows, 0)
        return x, y

    order = torch.randperm(count, generator=generator)
    model.train()
    for step, chosen in enumerate(order.split(size)):
        if step == arguments.warm_up:
            _wait(arguments.device)
            start = time.perf_counter()
        x, y = batch(chosen)
        if arguments.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.precision == "bf16-mixed"):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    _wait(arguments.device)
    return (time.perf_counter() - start) / arguments.steps


def profile(arguments: argparse.Namespace, poison: Poison) -> None:
    """Print the time per step by whose code it is; the difference of two lengths leaves out what happens once."""
    totals = []
    for steps in (arguments.steps, 2 * arguments.steps):
        profiler = cProfile.Profile()
        profiler.runcall(framework, argparse.Namespace(**{**vars(arguments), "steps": steps}), poison)
        owners: dict[str, float] = {}
        for (file, _, name), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
            owners[_owner(file, name)] = owners.get(_owner(file, name), 0.0) + own
        totals.append(owners)
    print(f"{arguments.backbone}: own time per step under the profiler, which slows Python code down")
    for owner in sorted(totals[1], key=lambda key: -totals[1][key]):
        print(f"{owner:28s} {(totals[1][owner] - totals[0].get(owner, 0.0)) / arguments.steps * 1e3:7.3f} ms")


def _owner(file: str, name: str) -> str:
    checkout = "site-packages" not in file and ("/callbacks/" in file or "/datamodules/" in file)
    if checkout or "lightning_bd" in file:
        return "lightning-bd"
    if "/lightning" in file:
        return "Lightning"
    if "/torch" in file:
        return "PyTorch, Python"
    if file == "~" and ("torch" in name or "Tensor" in name or "backward" in name):
        return "PyTorch, operators"
    return "Python's own functions"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="small_cnn", choices=["linear", "small_cnn", "resnet18"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25, help="timed steps per run")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the clock starts")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--logger", action=argparse.BooleanOptionalAction, default=True, help="TensorBoard")
    parser.add_argument("--sam", action="store_true", help="SAM in the framework's steps, not in the loop's")
    parser.add_argument("--profile", action="store_true", help="instead: whose Python code takes a step's time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    poison = Poison(BadNets(), rate=0.1)
    poison.prepare((3, 32, 32), 10)
    if arguments.profile:
        profile(arguments, poison)
        return
    runs = {
        "loop": lambda: loop(arguments, poison),
        "framework": lambda: framework(arguments, poison),
        "loop again": lambda: loop(arguments, poison),
    }
    alternate(runs, 1)
    seconds = alternate(runs, arguments.pairs)
    print(f"{arguments.backbone}, batch {arguments.batch_size}, {arguments.device}, {arguments.precision}, "
          f"channels_last {arguments.channels_last}, compile {arguments.compile}")  # fmt: skip
    report("framework / loop", seconds["framework"], seconds["loop"])
    report("loop / loop (A/A control)", seconds["loop again"], seconds["loop"])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    extra = statistics.median(a - b for a, b in zip(seconds["framework"], seconds["loop"], strict=True))
    print(f"loop {middle['loop'] * 1e3:.3f} ms, framework {middle['framework'] * 1e3:.3f} ms per step; "
          f"overhead {extra * 1e3:.3f} ms; {arguments.batch_size / middle['framework']:.0f} images/s")  # fmt: skip


if __name__ == "__main__":
    main()
