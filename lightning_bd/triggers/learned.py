"""The base of triggers that are learnt from the attacker's images before training."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_bd.cache import cache_folder, content_key, keep_tensors, read_tensors
from lightning_bd.description import Description, describe
from lightning_bd.functional.draws import keyed_global_state
from lightning_bd.selection.digests import image_digests, to_bytes
from lightning_bd.triggers.base import Trigger

__all__ = ("LearnedTrigger", "unlearned")

#: Part of every key; to be raised when what is common to all learnt triggers changes them.
_VERSION = 1


class LearnedTrigger(Trigger):
    """A trigger whose tensors come from the attacker's images, and not from the arguments alone.

    :class:`~lightning_bd.poisoning.Poison` calls :meth:`learn` with the images of the first poisoned phase; what was
    learnt is part of ``state_dict`` and of the manifest, so that nobody learns it again to use a checkpoint. It is also
    kept in ``triggers`` in the folder that the environment variable ``LIGHTNING_BD_CACHE`` names, else in
    ``~/.cache/lightning_bd``, under a key of the arguments and the images.

    A subclass implements ``_learn``, ``_specs`` and ``_transform``, and names in ``only_for_learning`` the arguments
    that a restored trigger does not need. These have defaults, and are not in ``hyperparameters`` or the manifest: that
    a config names others than a checkpoint's trigger was learnt with is not noticed where it is evaluated. The
    checkpoint's is used, or by ``--override-trigger`` the config's, learnt anew.

    Example:
        >>> import os
        >>> from tempfile import TemporaryDirectory
        >>> from unittest.mock import patch
        >>> from lightning_bd.triggers import TensorSpec
        >>> class MeanImage(LearnedTrigger):
        ...     def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        ...         return {"mean": TensorSpec(image_shape, 0.0, 1.0)}
        ...
        ...     def _learn(self, images: Tensor, labels: Tensor, target: int | None) -> dict[str, Tensor]:
        ...         return {"mean": images.float().mean(dim=0) / 255}
        ...
        ...     def _transform(self, images: Tensor) -> Tensor:
        ...         return torch.lerp(images, self.mean.to(images), 0.5)
        >>> trigger = MeanImage()
        >>> with TemporaryDirectory() as folder, patch.dict(os.environ, LIGHTNING_BD_CACHE=folder):
        ...     trigger.learn(torch.tensor([0, 102], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([0, 1]), None)
        >>> trigger(torch.ones(1, 1, 1, 1))
        tensor([[[[0.6000]]]])
    """

    #: Whether the attacker must know the images of the other classes too: a stronger threat model.
    needs_other_classes: ClassVar[bool] = False
    #: Names of the arguments that only learning needs.
    only_for_learning: ClassVar[tuple[str, ...]] = ()
    #: Part of the cache's key; to be raised when the same images and arguments give other tensors.
    version: ClassVar[int] = 1

    def learn(self, images: Tensor, labels: Tensor, target: int | None) -> None:
        """Learn the trigger's tensors, or read those that were learnt before; a built trigger stays as it is.

        The same images and arguments give the same tensors, whatever the order of the images; on the CPU bit for bit,
        with the same number of threads. The global random stream is put back.

        Args:
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1]; with ``needs_other_classes`` all that the
                attacker has, else those that may be poisoned.
            labels: ``(N,)`` int64, their true labels.
            target: The attacker's class; ``None`` if there is not exactly one.

        Raises:
            ValueError: If there are no images, the trigger does not fit them, or it cannot be learnt from them.
        """
        if self.image_shape is not None:
            return
        pixels, labels = to_bytes(images).cpu(), labels.to("cpu", torch.int64)
        if len(pixels) == 0 or labels.shape != (len(pixels),):
            raise ValueError(
                f"Expected images and as many labels to learn a `{type(self).__name__}` from, but got {len(pixels)} "
                f"images and labels of shape {tuple(labels.shape)}."
            )
        _, channels, height, width = pixels.shape
        shape = (channels, height, width)
        self._specs(shape)
        # In an order of the pixels' own: sums in another order would differ in their last bits.
        digests = image_digests(pixels)
        order = sorted(range(len(digests)), key=lambda row: (digests[row], int(labels[row])))
        labels = labels[order]
        key = self._key([digests[row] for row in order], labels, shape, target)
        path = cache_folder("triggers") / f"{type(self).__name__}-{key}.safetensors"
        if read_tensors(path, "The trigger", lambda tensors: self._restored(shape, tensors)):
            return
        with keyed_global_state(type(self).__name__, "learn"), torch.inference_mode(False), torch.enable_grad():
            tensors = self._learn(pixels[order], labels, target)
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        self.restore(shape, tensors)
        keep_tensors(path, tensors, "What was learnt of the trigger")

    def identity(self) -> Description:
        """Describe what the tensors depend on besides the images; external data must count by their content."""
        return describe(self)

    @abstractmethod
    def _learn(self, images: Tensor, labels: Tensor, target: int | None) -> dict[str, Tensor]:
        """Learn the tensors that ``_specs`` describes, with a progress bar.

        Args:
            images: ``(N, C, H, W)`` uint8 on the CPU, sorted by their pixels; at least one.
            labels: ``(N,)`` int64.
            target: The attacker's class; ``None`` if there is not exactly one.
        """

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        raise RuntimeError(
            f"`{type(self).__name__}` is learnt from images: call `learn(images, labels, target)` before it is used, "
            "or give it to a `Poison` of a datamodule, which does."
        )

    def _restored(self, shape: tuple[int, int, int], tensors: dict[str, Tensor]) -> bool:
        self.restore(shape, tensors)
        return True

    @classmethod
    def recorded_arguments(cls) -> list[str]:
        """Return the names of the ``__init__`` arguments that are not only for learning."""
        return [name for name in super().recorded_arguments() if name not in cls.only_for_learning]

    def _key(self, digests: list[bytes], labels: Tensor, shape: tuple[int, int, int], target: int | None) -> str:
        facts = {
            "versions": [_VERSION, self.version],
            "trigger": self.identity(),
            "target": target,
            "shape": list(shape),
        }
        return content_key(facts, digests, labels)


def unlearned(trigger: Trigger) -> list[LearnedTrigger]:
    """Return the parts of a trigger, or the trigger itself, that have yet to be learnt.

    Args:
        trigger: Any trigger, also one that is made of others.
    """
    return [part for part in trigger.modules() if isinstance(part, LearnedTrigger) and part.image_shape is None]
