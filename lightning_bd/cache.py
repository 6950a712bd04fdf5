"""Where results lie that are slow to compute, and how they get there."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

__all__ = ("cache_folder", "write_whole")


def cache_folder(kind: str) -> Path:
    """Return ``$LIGHTNING_BD_CACHE/<kind>`` or ``~/.cache/lightning_bd/<kind>``; it need not exist.

    Args:
        kind: What lies there.
    """
    root = os.environ.get("LIGHTNING_BD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "lightning_bd") / kind


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is either there as a whole or not at all; its folder is made.

    Args:
        path: The file.
        write: Writes the content into the file that it is given.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
