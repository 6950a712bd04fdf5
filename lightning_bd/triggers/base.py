"""The base of all triggers: build once, change whole batches, travel with a checkpoint."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ("TensorSpec", "Trigger")


class TensorSpec(NamedTuple):
    """What a trigger's tensor must look like, so that one from a checkpoint can be checked before use.

    Args:
        shape: Shape of the float32 tensor.
        low: Smallest value that the trigger can compute.
        high: Largest value that the trigger can compute.
    """

    shape: tuple[int, ...]
    low: float
    high: float


class Trigger(nn.Module, ABC):
    """A fixed change of pixels that a backdoored model reacts to.

    A trigger says *how* an image changes; which images are changed, and what their labels become, is decided by
    the caller. Its tensors (pattern, warping field, ...) are buffers that are computed once per image shape, from
    the arguments alone and never from the global random state. They are part of ``state_dict``.

    A subclass keeps every ``__init__`` argument as an attribute of the same name and implements three methods:
    ``_specs`` (names and shapes of its tensors; refuses an image that the trigger does not fit), ``_compute`` (their
    values) and ``_transform`` (images in, new images in [0, 1] out).

    Example:
        >>> from lightning_bd.triggers import BadNets
        >>> trigger = BadNets(size=2, seed=7)
        >>> trigger.build((3, 8, 8))
        >>> twin = type(trigger)(**trigger.hyperparameters)
        >>> twin.restore((3, 8, 8), trigger.state_dict())
        >>> images = torch.zeros(4, 3, 8, 8)
        >>> torch.equal(trigger(images), twin(images))
        True
    """

    #: Whether a model trains the tensors: triggers of this class with equal arguments are then the same trigger, at
    #: different times.
    is_trained: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._image_shape: tuple[int, int, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Shape (C, H, W) that the trigger was built for, ``None`` before."""
        return self._image_shape

    @property
    def hyperparameters(self) -> dict[str, object]:
        """The ``__init__`` arguments as plain builtins: paths as strings, tuples as lists.

        ``type(trigger)(**trigger.hyperparameters)`` is the same trigger, not yet built. An argument that is itself a
        trigger is described by ``{"class": name, "arguments": {...}}``, which must be built first.

        Raises:
            TypeError: If the subclass does not keep an argument as an attribute of the same name, or keeps a value
                that is not made of plain builtins.
        """
        kind = type(self)
        values: dict[str, object] = {}
        for name in self.recorded_arguments():
            # An AttributeError inside a property would be swallowed by `nn.Module.__getattr__`.
            if not hasattr(self, name):
                raise TypeError(f"Expected `{kind.__name__}` to keep its argument `{name}` as an attribute.")
            values[name] = _plain(name, getattr(self, name))
        return values

    def build(self, image_shape: tuple[int, int, int]) -> None:
        """Compute the trigger's tensors for images of one shape; a second call with the same shape does nothing.

        Args:
            image_shape: Shape (C, H, W) of the images.

        Raises:
            ValueError: If the shape is not three positive integers, if the trigger does not fit it, or if the trigger
                was built for another shape.
        """
        shape = self._checked(image_shape)
        if self._image_shape is None:
            specs = self._specs(shape)
            # Tensors made while validating would otherwise be unusable under autograd later.
            with torch.inference_mode(False), torch.no_grad():
                tensors = self._compute(shape)
            assert {name: tensor.shape for name, tensor in tensors.items()} == {n: s.shape for n, s in specs.items()}
            self._adopt(shape, tensors)

    def restore(self, image_shape: tuple[int, int, int], tensors: Mapping[str, Tensor]) -> None:
        """Build the trigger from saved tensors, without computing them or reading any file.

        Args:
            image_shape: Shape (C, H, W) of the images.
            tensors: What ``state_dict`` of the built trigger gave. Names, shapes, dtype and values are checked, and
                nothing is changed if any is wrong: they may come from a checkpoint that is not trusted.

        Raises:
            ValueError: If the shape is refused by :meth:`build`, or if the tensors are not what this trigger saves.
        """
        shape = self._checked(image_shape)
        specs = self._specs(shape)
        if set(tensors) != set(specs):
            raise ValueError(
                f"Expected the tensors of a `{type(self).__name__}` to be named {sorted(specs)}, "
                f"but got {sorted(map(str, tensors))}."
            )
        for name, spec in specs.items():
            _check_tensor(name, tensors[name], spec)
        with torch.inference_mode(False):
            self._adopt(shape, {name: tensors[name].detach().clone() for name in specs})

    def forward(self, images: Tensor) -> Tensor:
        """Put the trigger on every image of a batch; builds the trigger on first use.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].

        Raises:
            ValueError: If ``images`` is not such a tensor, or not of the shape that the trigger was built for.
        """
        self._prepare(images)
        return self._transform(images)

    def cover(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Change images as a *cover sample* is changed: the pixels move, the label will stay.

        Cover samples teach a model to answer to the exact trigger only. Here they are the triggered images
        themselves; a trigger with a noise mode overrides this.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.
            generator: CPU generator of the random draws; ``None`` is torch's global one. Unused by triggers whose
                covers are not random.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        covers: Tensor = self(images)
        return covers

    def attack(self, images: Tensor) -> Tensor:
        """Put the trigger on images as the attacker does at test time.

        Here as in training; a trigger that poisons at one strength and attacks at another overrides this.

        Args:
            images: Floating-point tensor (B, C, H, W), values in [0, 1]. Not modified.

        Returns:
            A new tensor of the same shape, dtype and device, values in [0, 1].
        """
        attacked: Tensor = self(images)
        return attacked

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters.items())

    @abstractmethod
    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        """Describe the tensors for this image shape; raise ValueError where the trigger does not fit it."""

    @abstractmethod
    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Compute the described tensors: float32, on the CPU, from the arguments alone."""

    @abstractmethod
    def _transform(self, images: Tensor) -> Tensor:
        """Return changed copies of checked images, in [0, 1]."""

    @classmethod
    def recorded_arguments(cls) -> list[str]:
        """Return the names of the ``__init__`` arguments that :attr:`hyperparameters` holds."""
        return list(inspect.signature(cls).parameters)

    def _checked(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        if len(image_shape) != 3 or not all(isinstance(side, int) and side > 0 for side in image_shape):
            raise ValueError(
                f"Expected argument `image_shape` to be three positive integers (C, H, W), but got {image_shape}."
            )
        channels, height, width = image_shape
        if self._image_shape not in (None, (channels, height, width)):
            raise ValueError(
                f"Expected argument `image_shape` to be {self._image_shape}, which this trigger was built for, "
                f"but got {(channels, height, width)}."
            )
        return channels, height, width

    def _prepare(self, images: Tensor) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                "Expected argument `images` to be a floating-point tensor of shape (B, C, H, W), "
                f"but got {images.dtype} of shape {tuple(images.shape)}."
            )
        _, channels, height, width = images.shape
        if self._image_shape is None:
            self.build((channels, height, width))
            with torch.inference_mode(False):
                self.to(images.device)
        elif self._image_shape != (channels, height, width):
            raise ValueError(
                f"Expected argument `images` to hold images of shape {self._image_shape}, which this trigger was "
                f"built for, but got {(channels, height, width)}."
            )

    def _adopt(self, image_shape: tuple[int, int, int], tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._image_shape = image_shape


def _plain(name: str, value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(name, item) for item in value]
    if isinstance(value, Trigger):
        return {"class": type(value).__qualname__, "arguments": value.hyperparameters}
    raise TypeError(f"Expected attribute `{name}` to be made of plain builtins, but got a {type(value).__name__}.")


def _check_tensor(name: str, tensor: Tensor, spec: TensorSpec) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.dtype is not torch.float32:
        got = f"{tensor.dtype} ({tensor.layout})" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"Expected tensor `{name}` to be a dense tensor of dtype torch.float32, but got {got}.")
    if tensor.shape != spec.shape:
        raise ValueError(f"Expected tensor `{name}` to have shape {spec.shape}, but got {tuple(tensor.shape)}.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"Expected tensor `{name}` to hold all of its values, but got a view that repeats some.")
    # NaN fails both comparisons.
    if not bool(((tensor >= spec.low) & (tensor <= spec.high)).all()):
        raise ValueError(
            f"Expected tensor `{name}` to hold finite values in [{spec.low}, {spec.high}], "
            f"but got values from {tensor.min().item()} to {tensor.max().item()}."
        )
