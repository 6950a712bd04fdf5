"""Training and evaluation mode, put back."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ("mode",)


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
