"""Files that are there as a whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ("open_atomically", "write_text_atomically")


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing so that ``path`` is either the old file or, after the block, the whole new one.

    Written to a temporary file in the same folder, flushed to disk, then renamed; after an exception it is removed.

    Args:
        path: Where; its folder is made.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not of `tempfile`, whose files only their owner may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small text file, as UTF-8, so that it is either the old one or the whole new one.

    Args:
        path: Where; its folder is made.
        text: The content.

    Raises:
        OSError: If it cannot be written.
    """
    with open_atomically(path) as file:
        file.write(text.encode())
