"""Commands beyond Lightning's own: defend, interpolate, landscape, sharpness."""

from lightning_bd.commands.trainer import CommandTrainer

__all__ = ("CommandTrainer",)
