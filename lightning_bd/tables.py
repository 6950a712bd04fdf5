"""Tables as CSV files."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_bd.files import write_text_atomically

__all__ = ("write_rows",)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file so that it is either the old one or the whole new one.

    Args:
        path: Where; its folder is made.
        columns: The columns, in order; other entries of a row are left out, ``None`` is an empty cell.
        rows: Column -> value.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, text.getvalue())
