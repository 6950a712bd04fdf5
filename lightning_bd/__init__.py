"""Backdoor learning on PyTorch Lightning."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# An uninstalled checkout keeps callbacks/, datamodules/ and configs/ beside this package.
if not (_Path(__file__).parent / "callbacks").is_dir() and (_Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(_Path(__file__).parents[1]))
