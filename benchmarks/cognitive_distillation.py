"""Speed of Cognitive Distillation on ResNet-18 against a loop with gradients in the whole model, and its memory.

python benchmarks/cognitive_distillation.py --device cpu --threads 2 --images 16 --steps 10
python benchmarks/cognitive_distillation.py --device cuda --images 256 --steps 100

The loop computes the clean logits once, too. Every step costs the same, so that few are enough to measure.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from _pairs import alternate, report
from torch import Tensor, nn

from lightning_bd.backbones import resnet18
from lightning_bd.callbacks.detection.cognitive_distillation import CognitiveDistillation


def loop(model: nn.Module, images: Tensor, steps: int) -> Tensor:
    """Find masks as one would write it down: the backward pass fills the gradients of all weights."""
    with torch.no_grad():
        clean = model(images)
    theta = torch.ones(len(images), 1, *images.shape[2:], device=images.device, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.1, betas=(0.1, 0.1))
    for _ in range(steps):
        masks = (torch.tanh(theta) + 1) / 2
        colors = torch.rand(len(images), images.shape[1], 1, 1, device=images.device)
        logits = model(images * masks + (1 - masks) * colors)
        vertical = (masks[:, :, 1:] - masks[:, :, :-1]).square().sum(dim=(1, 2, 3))
        horizontal = (masks[..., 1:] - masks[..., :-1]).square().sum(dim=(1, 2, 3))
        variation = (vertical + horizontal) / masks[0].numel()
        loss = (logits - clean).abs().mean(dim=1) + 0.01 * masks.sum(dim=(1, 2, 3)) + variation
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return -((torch.tanh(theta.detach()) + 1) / 2).sum(dim=(1, 2, 3))


def timed(function: Callable[[], Tensor], device: torch.device) -> Callable[[], float]:
    """Return a function that gives the wall time of one call, device included."""

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def peak_memory(device: torch.device) -> float:
    """Highest memory so far in MB: of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    count, steps = arguments.images, arguments.steps
    model = resnet18(num_classes=10).eval().to(device)
    detector, quick = CognitiveDistillation(steps=steps), CognitiveDistillation(steps=1)

    def score_set(size: int) -> None:
        for _ in range(0, size, 32):
            quick.score(model, torch.rand(32, 3, 32, 32, device=device))

    peaks = []
    for size in (64, 512):
        score_set(size)
        peaks.append(peak_memory(device))

    images = torch.rand(count, 3, 32, 32, device=device)
    runs = {
        "ours": timed(lambda: detector.score(model, images), device),
        "loop": timed(lambda: loop(model, images, steps), device),
    }
    for run in runs.values():
        run()
    times = alternate(runs, arguments.pairs)
    print(f"device {device}, ResNet-18 at 32x32, {count} images, {steps} steps, {arguments.threads} threads")
    for name, measured in times.items():
        each = statistics.median(measured) / steps
        print(f"{name:5s} {count / each / 100:8.2f} images per second at 100 steps")
    report("time of the loop / ours", times["loop"], times["ours"])
    print(f"peak memory after 64 images {peaks[0]:.0f} MB, after 512 more {peaks[1]:.0f} MB, in batches of 32")


if __name__ == "__main__":
    main()
