"""How badly a model that knows other data beside the attacker's images does on these."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from lightning_bd.description import Description
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.selection.base import SampleScorer
from lightning_bd.selection.digests import to_bytes
from lightning_bd.selection.surrogate import Surrogate

__all__ = ("OODLoss",)


class OODLoss(SampleScorer):
    """Difficulty by the loss of a surrogate that tells the attacker's class from classes of other data.

    The third score of `Wicked Oddities <https://arxiv.org/abs/2407.10825>`_: labelled out-of-distribution images and
    the attacker's own, as one class more, train a surrogate; the score is the cross-entropy of each of the attacker's
    images after training, in evaluation mode. The attacker needs no other class of the victim's data.

    Differs from the paper in the data, which are whatever ``ood`` holds (the paper's: 100 classes), and in that classes
    are not balanced. Images of several classes, where those may be poisoned, make one class more for each.

    Args:
        ood: Folder with one sub-folder of images per class, at least two; hidden ones are left out. All images are
            resized (bilinear, antialiased) to the attacker's and held in memory, grey if those are.
        surrogate: How the model is trained; ``None`` for the defaults of
            :class:`~lightning_bd.selection.surrogate.Surrogate`.
        max_images: Use at most this many images per class, drawn by the surrogate's seed; ``None``: all.

    Raises:
        ValueError: If an argument is out of its range; when scored, if the folder has fewer than two classes, one of
            them no image or one that cannot be read, or the attacker's images have neither 1 nor 3 channels.
        FileNotFoundError: When scored, if there is no such folder.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_bd.backbones import small_cnn
        >>> with TemporaryDirectory() as folder:
        ...     for name, shade in (("dark", 0), ("light", 255)):
        ...         (Path(folder) / name).mkdir()
        ...         Image.new("L", (8, 8), shade).save(Path(folder) / name / "0.png")
        ...     scorer = OODLoss(folder, Surrogate(small_cnn, epochs=2))
        ...     scorer.score(torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64), 0).shape
        torch.Size([20])
    """

    needs_other_classes: ClassVar[bool] = False

    def __init__(self, ood: str | Path, surrogate: Surrogate | None = None, max_images: int | None = None) -> None:
        if max_images is not None and max_images < 1:
            raise ValueError(f"Expected argument `max_images` to be a positive integer or None, but got {max_images}.")
        self.ood = Path(ood)
        self.surrogate = surrogate if surrogate is not None else Surrogate()
        self.max_images = max_images

    def score(self, images: Tensor, labels: Tensor, target: int | None) -> Tensor:
        """Return losses ``(N,)`` float64 of images ``(N, C, H, W)`` with labels ``(N,)``."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Expected images of 1 or 3 channels for `OODLoss`, but got {images.shape[1]}.")
        classes = self._classes()
        others = _read([file for files in classes for file in files], images.shape)
        sizes = torch.tensor([len(files) for files in classes])
        # The attacker's classes come behind the others.
        numbers = {label: len(classes) + rank for rank, label in enumerate(sorted(set(labels.tolist())))}
        own = torch.tensor([numbers[label] for label in labels.tolist()])
        network = self.surrogate.train(
            torch.cat([others, to_bytes(images)]), torch.cat([torch.arange(len(classes)).repeat_interleave(sizes), own])
        )
        logits = self.surrogate.predict(network, images, _logits)
        return F.cross_entropy(logits.double(), own, reduction="none")

    def identity(self) -> Description:
        """Describe the arguments, and the other data by their content instead of by where they lie."""
        described = super().identity()
        assert isinstance(described, dict)
        digest = hashlib.sha256()
        for files in self._classes():
            for file in files:
                name = os.fsencode(file.relative_to(self.ood).as_posix())
                digest.update(hashlib.sha256(name).digest() + hashlib.sha256(file.read_bytes()).digest())
        named = {name: value for name, value in described.items() if name != "ood"}
        return {**named, "ood_sha256": digest.hexdigest()}

    def _classes(self) -> list[list[Path]]:
        """Return the files that are used of each class, both in the order of their names."""
        if not self.ood.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.ood.absolute()} of out-of-distribution images. Nothing is downloaded: put "
                "one sub-folder of images per class there, or set the scorer's `ood` to where they lie."
            )
        folders = sorted(entry for entry in self.ood.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if len(folders) < 2:
            raise ValueError(
                f"Expected argument `ood` to be a folder with a sub-folder per class, at least 2, but {self.ood} has "
                f"{len(folders)}."
            )
        return [self._files(folder) for folder in folders]

    def _files(self, folder: Path) -> list[Path]:
        files = sorted(
            file for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".")
        )
        if not files:
            raise ValueError(
                f"Expected each sub-folder of argument `ood` to hold images ({', '.join(IMG_EXTENSIONS)}), but "
                f"{folder} holds none."
            )
        # Drawn, not the first ones: neighbours in a folder are often frames of one video.
        order = torch.randperm(len(files), generator=keyed_generator(self.surrogate.seed, "ood images", folder.name))
        return [files[row] for row in order[: self.max_images].sort().values.tolist()]


def _read(files: list[Path], like: torch.Size) -> Tensor:
    """Return images ``(N, C, H, W)`` uint8 with the channels and the size of ``like``."""
    mode, size = "L" if like[1] == 1 else "RGB", (like[3], like[2])
    found = torch.empty(len(files), *like[1:], dtype=torch.uint8)
    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        arrays = pool.map(lambda file: _decoded(file, mode, size), files)
        for row, array in enumerate(tqdm(arrays, "other data", total=len(files), leave=False, delay=3)):
            found[row] = torch.from_numpy(array).view(*size[::-1], like[1]).permute(2, 0, 1)
    return found


def _decoded(file: Path, mode: str, size: tuple[int, int]) -> "np.typing.NDArray[np.uint8]":
    try:
        with Image.open(file) as image:
            pixels = image.convert(mode)
    # Pillow reports broken files by any of these.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {file}: {error}. Remove or replace the file.") from error
    return np.array(pixels if pixels.size == size else pixels.resize(size, Image.Resampling.BILINEAR))


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images)
    return logits
