"""Time and peak memory of the Fisher diagonal of ResNet-18 against a loop over single samples.

python benchmarks/fisher.py --device cpu --samples 64 --threads 2
python benchmarks/fisher.py --device cuda --samples 512
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bd.backbones import resnet18
from lightning_bd.functional.fisher import fisher_diagonal


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Square the gradient of one sample after the other; as fast as plain autograd allows."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(images[:, None], labels[:, None], strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        torch._foreach_addcmul_(sums, list(gradients), list(gradients))
    return {name: total / len(images) for name, total in zip(names, sums, strict=True)}


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> float:
    """Highest memory so far in GB: of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunk-size", type=int, default=None)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    model = resnet18(num_classes=10).eval().to(device)
    images = torch.rand(arguments.samples, 3, 32, 32, device=device)
    labels = torch.randint(10, (arguments.samples,), device=device)

    def ours() -> dict[str, Tensor]:
        return fisher_diagonal(model, [(images, labels)], chunk_size=arguments.chunk_size)

    def by_loop() -> dict[str, Tensor]:
        return loop(model, images, labels)

    before = peak_memory(device)
    fisher = ours()  # also the warm-up; the peak of ours, since the loop has not run
    after = peak_memory(device)
    expected = by_loop()
    total, reference = (torch.cat([tensor.flatten() for tensor in d.values()]) for d in (fisher, expected))
    error = float((total - reference).norm() / reference.norm())

    times: dict[str, list[float]] = {"loop": [], "ours": []}
    for repeat in range(arguments.repeats):
        order = [("loop", by_loop), ("ours", ours)]
        for name, function in order if repeat % 2 == 0 else order[::-1]:
            times[name].append(seconds(function, device))
    loop_time, our_time = statistics.median(times["loop"]), statistics.median(times["ours"])
    print(f"device {device}, {arguments.samples} samples, {arguments.threads} threads, median of {arguments.repeats}")
    print(f"loop {loop_time:.3f} s, ours {our_time:.3f} s, loop / ours {loop_time / our_time:.2f}")
    print(f"relative difference {error:.1e}")
    print(f"peak memory {after:.2f} GB, {before:.2f} GB before the first call")


if __name__ == "__main__":
    main()
