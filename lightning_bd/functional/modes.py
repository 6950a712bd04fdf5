"""Modes of a network, put back: training or evaluation, parameters with gradients or without."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ("mode", "without_parameter_gradients")


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Switch the whole model to training or evaluation inside the block, and every module back to what it was.

    Args:
        model: Any module.
        training: Whether to train inside the block.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1).eval())
        >>> with mode(model, training=False):
        ...     model[0].training
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter need a gradient inside the block, so that a backward pass only goes to the images.

    Args:
        model: Any module.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> with without_parameter_gradients(model):
        ...     model.weight.requires_grad
        False
        >>> model.weight.requires_grad
        True
    """
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
