"""The base of triggers that are made of other triggers."""

from collections.abc import Mapping

from torch import Tensor

from lightning_bd.triggers.base import TensorSpec, Trigger

__all__ = ("CompositeTrigger",)


class CompositeTrigger(Trigger):
    """A trigger made of other triggers, its parts, which are built, saved and restored with it.

    A subclass registers its parts as submodules, keeps its ``__init__`` arguments as attributes like any trigger, and
    implements ``_transform``. In ``state_dict`` a part's tensors have the part's name as prefix. In ``hyperparameters``
    a part is ``{"class": name, "arguments": {...}}``, from which :class:`~lightning_bd.manifest.PoisonManifest` builds
    it again if it is one of this library's triggers.

    Example:
        >>> from lightning_bd.triggers import SIG, BadNets, SequentialTrigger
        >>> trigger = SequentialTrigger([SIG(), BadNets(size=2)])
        >>> trigger.build((1, 4, 4))
        >>> list(trigger.state_dict())
        ['0.wave', '1.pattern_values']
    """

    def extra_repr(self) -> str:
        """Show nothing besides the parts."""
        return ""

    def _parts(self) -> dict[str, Trigger]:
        return {name: part for name, part in self._modules.items() if isinstance(part, Trigger)}

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for name, part in self._parts().items():
            specs |= {f"{name}.{key}": spec for key, spec in part._specs(part._checked(image_shape)).items()}
        return specs

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, part in self._parts().items():
            # A part that was restored before must keep its pixels.
            mine = part._compute(image_shape) if part.image_shape is None else part.state_dict()
            tensors |= {f"{name}.{key}": tensor for key, tensor in mine.items()}
        return tensors

    def _adopt(self, image_shape: tuple[int, int, int], tensors: Mapping[str, Tensor]) -> None:
        for name, part in self._parts().items():
            prefix = f"{name}."
            mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            part._adopt(image_shape, mine)
        super()._adopt(image_shape, {})
