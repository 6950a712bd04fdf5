"""Writing a folder of images per class so that it is read again in the same order, size and number of channels."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor

__all__ = (
    "INCOMPLETE",
    "ORDER",
    "ImageTreeWriter",
    "TreeOrder",
    "check_shape",
    "folder_names",
    "read_order",
    "unfinished",
)

#: A file of this name marks a folder that is not, or never was, written to its end.
INCOMPLETE = "INCOMPLETE"
#: The file that lists the images in order.
ORDER = "images.json"
_PARTS = ("train", "test")
_MAX_SIDE = 8192


@dataclass(frozen=True)
class TreeOrder:
    """How a tree's images are to be read.

    Attributes:
        image_shape: ``(C, H, W)``, C being 1 or 3 and H equal to W.
        files: ``train`` and ``test`` -> ``<class>/<file>`` of each image, in order.
    """

    image_shape: tuple[int, int, int]
    files: Mapping[str, Sequence[str]]


class ImageTreeWriter:
    """Writes ``train/<class>/<index>.png`` and ``test/<class>/<index>.png``, several files at once.

    Args:
        folder: An empty folder.
        class_names: Name of each class; see :func:`folder_names`.
        image_shape: ``(C, H, W)`` of every image, C being 1 or 3 and H equal to W.

    Raises:
        MisconfigurationException: If an image folder cannot hold such images.

    Example:
        >>> import tempfile, torch
        >>> root = Path(tempfile.mkdtemp())
        >>> writer = ImageTreeWriter(root, ("cat", "dog"), (1, 8, 8))
        >>> images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> writer.add("train", images, torch.tensor([1, 0]), torch.tensor([4, 7]))
        >>> writer.finish()
        >>> read_order(root).files["train"]
        ('dog/000004.png', 'cat/000007.png')
    """

    def __init__(self, folder: Path, class_names: Sequence[str], image_shape: tuple[int, int, int]) -> None:
        check_shape(image_shape)
        self._folder = folder
        self._names = folder_names(class_names)
        self._image_shape = image_shape
        self._files: dict[str, list[str]] = {part: [] for part in _PARTS}
        for part in _PARTS:
            for name in self._names:
                (folder / part / name).mkdir(parents=True)

    def add(self, part: str, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Write images behind those that were added before.

        Args:
            part: ``train`` or ``test``.
            images: ``(B, C, H, W)`` uint8.
            labels: ``(B,)`` the classes whose folders they go to.
            indices: ``(B,)`` what the files are called, each once per part.

        Raises:
            OSError: If a file cannot be written.
        """
        arrays = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        files = [f"{self._names[y]}/{i:06d}.png" for y, i in zip(labels.tolist(), indices.tolist(), strict=True)]

        def save(row: int) -> None:
            array = arrays[row]
            Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(self._folder / part / files[row])

        # Pillow releases the interpreter lock while it compresses, and the system while it makes the file.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(save, range(len(files))))
        self._files[part] += files

    def finish(self) -> None:
        """Write the order of the images."""
        order = {"image_shape": list(self._image_shape), **self._files}
        (self._folder / ORDER).write_text(json.dumps(order, indent=0) + "\n", encoding="utf-8")


@contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder as incomplete until the block ends; after an exception it stays marked.

    Args:
        folder: Made if it is missing.

    Raises:
        MisconfigurationException: If it is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        why = "is not a folder" if not folder.is_dir() else "is not empty"
        if (folder / INCOMPLETE).exists():
            why += " (what was written there before was cut, and is incomplete)"
        raise MisconfigurationException(f"{folder.absolute()} {why}. Give another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / INCOMPLETE
    with mark.open("x", encoding="utf-8") as file:
        file.write("This folder was not written to its end. Remove it and write it again.\n")
    yield
    mark.unlink()


def check_shape(image_shape: tuple[int, int, int]) -> None:
    """Refuse images that cannot be read again as they were.

    Args:
        image_shape: ``(C, H, W)``.

    Raises:
        MisconfigurationException: If they are neither grey nor RGB, or not square.
    """
    if not _is_shape(image_shape):
        raise MisconfigurationException(
            f"An image folder holds square images of 1 or 3 channels, but these are {tuple(image_shape)}."
        )


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Return a name of a folder per class; sorted, they are in the order of the classes.

    Names that are not sorted, or that cannot be names of folders, get the class's number in front.

    Args:
        class_names: Any.

    Example:
        >>> folder_names(["cat", "dog"]), folder_names(["stop", "give way/yield"])
        (['cat', 'dog'], ['0_stop', '1_give way_yield'])
    """
    plain = [re.sub(r"[^\w ()+,&-]", "_", name)[:100].strip() for name in class_names]
    distinct = len({name.casefold() for name in plain}) == len(plain) and all(plain)
    if distinct and plain == list(class_names) == sorted(class_names):
        return plain
    width = len(str(len(plain) - 1))
    return [f"{label:0{width}d}_{name}" for label, name in enumerate(plain)]


def read_order(folder: Path) -> TreeOrder | None:
    """Read the order of a tree's images; ``None`` if the folder has none.

    Whether its files exist is not looked at.

    Args:
        folder: The tree.

    Raises:
        MisconfigurationException: If the file is broken.
    """
    path = folder / ORDER
    if not path.exists():
        return None
    fix = f"Restore it, or remove it to read the files in the order of their names as RGB: {path.absolute()}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MisconfigurationException(f"The order of the images cannot be read: {error}. {fix}") from error
    values = found if isinstance(found, dict) else {}
    files = {}
    for part in _PARTS:
        names = values.get(part)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise MisconfigurationException(f"The order of the images has no list of files `{part}`. {fix}")
        files[part] = tuple(names)
    shape = values.get("image_shape")
    if not _is_shape(shape):
        raise MisconfigurationException(f"The order of the images has no valid `image_shape`, but {shape!r}. {fix}")
    channels, height, width = shape
    return TreeOrder((channels, height, width), files)


def _is_shape(shape: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(type(side) is int for side in shape):
        return False
    return shape[0] in (1, 3) and shape[1] == shape[2] and 0 < shape[1] <= _MAX_SIDE
