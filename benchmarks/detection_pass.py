"""What detectors cost beside the forward pass that they share.

CTM: (fit + score - forward) / forward over the same images. All detectors of logits and features together, fitted: a
`Trainer.test` with them against a plain one. ResNet-18 at 32x32.

    python benchmarks/detection_pass.py
    python benchmarks/detection_pass.py --device cuda --images 10000 --pairs 20
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable

import torch
from _pairs import alternate, report
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.backbones import resnet18
from lightning_bd.callbacks import FeatureDetector
from lightning_bd.callbacks.detection.session import ScoringSession
from lightning_bd.classifier import BackdoorClassifier
from lightning_bd.commands.detectors import load_detectors, shipped_detectors

Loader = DataLoader[tuple[torch.Tensor, ...]]


def loader(images: int, seed: int) -> Loader:
    """Noise; what the images show changes no time."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 10
    return DataLoader(TensorDataset(torch.rand(images, 3, 32, 32, generator=generator), labels), batch_size=64)


def timed(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Return a function that gives the wall time of one call, device included."""

    def run() -> float:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument(
        "--bank", type=int, default=1024, help="images that the detectors of the second part are fitted on"
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    model = BackdoorClassifier(resnet18(num_classes=10), num_classes=10).to(device).eval()
    fit, test, far = (loader(arguments.images, seed) for seed in (1, 2, 3))
    # ViM needs more images than features.
    bank = loader(arguments.bank, 4)

    def batches(*loaders: Loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(images.to(device), labels.to(device)) for each in loaders for images, labels in each]

    print(f"torch {torch.__version__}, {device}, {arguments.threads} threads, {arguments.images} images per set\n")
    (ctm,) = load_detectors("ctm").values()
    fitting, scoring = batches(fit), batches(test)

    def forward() -> None:
        with torch.no_grad():
            for images, _ in (*fitting, *scoring):
                model(images)

    def detect() -> None:
        ctm.forget()
        session = ScoringSession(model, [ctm])
        session.fit(lambda _source: fitting)
        for batch in scoring:
            session.run(0, batch)
        session.results()

    forward()
    detect()
    seconds = alternate({"forward": timed(forward, device), "detect": timed(detect, device)}, arguments.pairs)
    ratio = report("CTM fit + score / forward", seconds["detect"], seconds["forward"])
    print(f"{'':36s} (fit + score - forward) / forward = {ratio - 1:.3f}; target at most 0.05\n")

    names = [name for name, d in load_detectors(list(shipped_detectors())).items() if isinstance(d, FeatureDetector)]
    detectors = list(load_detectors(names).values())
    for detector in detectors:
        detector.dataloader = bank

    def tester(*callbacks: Callback) -> Callable[[], float]:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, logger=False, callbacks=list(callbacks),
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        return timed(lambda: trainer.test(model, dataloaders=[test, far], verbose=False), device)

    runs = {"plain": tester(), "all": tester(*detectors), "again": tester()}
    for run in runs.values():
        run()  # fits the detectors too
    seconds = alternate(runs, arguments.pairs)
    report("plain test / plain test (A/A)", seconds["again"], seconds["plain"])
    report(f"test with {len(names)} detectors / plain test", seconds["all"], seconds["plain"])
    print(f"{'':36s} {', '.join(names)}; target at most 1.15")


if __name__ == "__main__":
    main()
