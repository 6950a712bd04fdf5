"""Poisoned images that some other program made."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lightning_bd.crafting.base import Crafting
from lightning_bd.description import Description

__all__ = ("PrecomputedPoison",)


class PrecomputedPoison(Crafting):
    """Take poisoned images from a folder, so that any outside generator can be used as an attack.

    What takes the place of the training image at position ``index`` (after ``subset``, as ``Sample.index`` says) is the
    file ``<index>.png``, at any depth in the folder; zeros in front of the number do not matter. The files are final:
    no trigger is put on top. The poison says how many are used (``rate``), which labels they get (``target``,
    ``clean_label``) and from which it chooses (``selection``), of those that are there.

    Args:
        folder: The poisoned training images, PNG, of the size of the data set's and in its channels (RGB, or grey if
            the data set is). Looked at when the first poisoned phase is about to begin, never to evaluate a model.
        test_folder: The images of the attack test set, named by their position in the test set (after
            ``test_subset``). Attack success is measured on those of them that the attack aims at; test images without a
            file are not attacked. They are held in memory. ``None``: the poison's trigger makes the attack test set.

    Raises:
        ValueError: When used, if a folder holds no PNG file, one that is not named by a position in the data set, two
            of one position, or one that cannot be read or is of another size or kind.
        FileNotFoundError: When used, if a folder is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("L", (8, 8), 7).save(Path(folder) / "0003.png")
        ...     poison = PrecomputedPoison(folder)
        ...     clean = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
        ...     made = poison.craft(torch.tensor([3]), torch.arange(5), torch.zeros(5), clean.__getitem__)
        ...     made.unique(), poison.available(torch.arange(5)).tolist()
        (tensor([7], dtype=torch.uint8), [False, False, False, True, False])
    """

    includes_trigger: ClassVar[bool] = True

    def __init__(self, folder: str | Path, test_folder: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.test_folder = None if test_folder is None else Path(test_folder)
        self._train: dict[int, Path] | None = None
        self._test: tuple[Tensor, Tensor] | None = None
        self._digest: str | None = None

    def available(self, positions: Tensor) -> Tensor:
        """Return which training images have a file, as ``(B,)`` bool for ``positions`` ``(B,)``."""
        return torch.isin(positions, torch.tensor(sorted(self._files()), dtype=torch.int64))

    def check(self, total: int) -> None:
        """Refuse files that are not named by a position in the training set of ``total`` images."""
        _check_range(self._files(), total, "training", "subset")

    def craft(self, chosen: Tensor, positions: Tensor, labels: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Read the files; see :meth:`Crafting.craft <lightning_bd.crafting.Crafting.craft>`."""
        files = self._files()
        channels, height, width = read(chosen[:1]).shape[1:]
        return _read([files[position] for position in chosen.tolist()], (channels, height, width))

    def attack_images(self, image_shape: tuple[int, int, int], total: int) -> tuple[Tensor, Tensor] | None:
        """Return positions and images of ``test_folder``, read once; ``None`` without it."""
        if self.test_folder is None:
            return None
        if self._test is None:
            files = _find(self.test_folder, "test_folder")
            _check_range(files, total, "test", "test_subset")
            positions = sorted(files)
            images = _read([files[position] for position in positions], image_shape)
            self._test = torch.tensor(positions, dtype=torch.int64), images
        return self._test

    def attack_digest(self) -> str | None:
        """Return a SHA-256 hex digest of the files in ``test_folder``, computed once; ``None`` without it."""
        if self.test_folder is not None and self._digest is None:
            digest = hashlib.sha256()
            for position, file in sorted(_find(self.test_folder, "test_folder").items()):
                digest.update(f"{position}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
            self._digest = digest.hexdigest()
        return self._digest

    def limits(self) -> str:
        """Say how many files there are."""
        return f"{self.folder} holds {len(self._files())} images"

    def facts(self) -> dict[str, Description]:
        """Describe it without its folders."""
        return {**super().facts(), "arguments": {}}

    def _files(self) -> dict[int, Path]:
        if self._train is None:
            self._train = _find(self.folder, "folder")
        return self._train


def _find(folder: Path, argument: str) -> dict[int, Path]:
    """Return the files of a folder by position."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder.absolute()} of poisoned images: put files `<index>.png` there, or set the "
            f"crafting's `{argument}` to where they lie."
        )
    found: dict[int, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() != ".png" or file.name.startswith(".") or not file.is_file():
            continue
        if not (file.stem.isascii() and file.stem.isdigit()):
            raise ValueError(
                f"Expected the images in {folder} to be named `<index>.png` by the position of the image that they "
                f"replace, but found {file}. Rename or remove it."
            )
        position = int(file.stem)
        if position in found:
            raise ValueError(f"Expected one image per position, but {found[position]} and {file} are two. Remove one.")
        found[position] = file
    if not found:
        raise ValueError(
            f"Expected argument `{argument}` to be a folder of images `<index>.png`, but {folder} holds no PNG file. "
            "Other formats are not read: JPEG would change the pixels."
        )
    return found


def _check_range(files: dict[int, Path], total: int, part: str, option: str) -> None:
    last = max(files)
    if last >= total:
        raise ValueError(
            f"{files[last]} is named by position {last}, but there are only {total} {part} images (after "
            f"`data.{option}`). Use the data set that the images were made for."
        )


@torch.inference_mode(False)  # the threads are in no inference mode either, and fill the tensor
def _read(files: list[Path], image_shape: tuple[int, int, int]) -> Tensor:
    """Return images ``(N, C, H, W)`` uint8."""
    images = torch.empty((len(files), *image_shape), dtype=torch.uint8)

    def fill(row: int) -> None:
        images[row] = _decoded(files[row], image_shape)

    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in tqdm(pool.map(fill, range(len(files))), "poisoned images", total=len(files), leave=False, delay=3):
            pass
    return images


def _decoded(file: Path, image_shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = image_shape
    try:
        with Image.open(file) as image:
            mode, size, array = image.mode, image.size, np.array(image)
    # Pillow reports broken files by any of these.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {file}: {error}. Make it anew, or remove it.") from error
    wanted = "L" if channels == 1 else "RGB"
    if mode != wanted or size != (width, height):
        raise ValueError(
            f"Expected {file} to be {width} x {height} pixels of mode {wanted} like the data set's images, but it is "
            f"{size[0]} x {size[1]} of mode {mode}. Poisoned images are used as they are: make it anew."
        )
    pixels = torch.from_numpy(array)
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
