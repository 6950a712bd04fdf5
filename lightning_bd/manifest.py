"""The record of a poison: enough to trigger a model again, years later, without trusting the file."""

import copy
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_bd import label_maps, triggers
from lightning_bd.description import describe, differences
from lightning_bd.files import open_atomically, write_text_atomically
from lightning_bd.label_maps import LabelMap
from lightning_bd.manifest_checks import CHECKS, LATER_FIELDS, MAX_DEPTH, Plain, is_recipe
from lightning_bd.triggers import Trigger
from lightning_bd.triggers.composite import CompositeTrigger

if TYPE_CHECKING:
    from lightning_bd.poisoning import Poison

__all__ = ("PoisonManifest",)

#: Of a value of a file, which may be of any size and depth.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlevel = 6


@dataclass(frozen=True)
class PoisonManifest:
    """Trigger with its pixels, label map, rate, chosen images and the data set's fingerprint.

    Written next to every run (``manifest.json`` and ``manifest.safetensors``) and inside each of its checkpoints.

    Attributes:
        trigger: ``{"class": name, "arguments": {...}}``; an argument that is a trigger is described the same way.
        image_shape: ``(C, H, W)`` that the trigger was built for.
        label_map: ``{"class": name, "arguments": {...}}``.
        rate: Share of poisoned images.
        mode: ``"static"`` or ``"dynamic"``.
        clean_label: Whether labels were left as they were.
        cover_rate: Share of cover images.
        seed: Seed of the choice of images.
        dataset: Name, SHA-256, number of images and classes.
        tensors: ``trigger.*``: the trigger's buffers; ``indices.<phase>``: ``(P,)`` int64 positions of a static poison.
        cover_classes: The classes that cover images are of; ``None`` for all, also where a manifest does not say.
        crafting: ``{"class": name, "arguments": {...}, "attack_images": ...}``, the last being the SHA-256 of test
            images that were made elsewhere, or ``None``; ``None`` without a crafting.
    """

    trigger: dict[str, Plain]
    image_shape: tuple[int, int, int]
    label_map: dict[str, Plain]
    rate: float
    mode: str
    clean_label: bool
    cover_rate: float
    seed: int
    dataset: dict[str, str | int]
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    cover_classes: list[int] | None = None
    crafting: dict[str, Plain] | None = None

    @classmethod
    def describe(
        cls,
        poison: "Poison",
        dataset: dict[str, str | int],
        indices: Mapping[str, Tensor] | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> "PoisonManifest":
        """Describe a prepared poison.

        Args:
            poison: The rule, after ``prepare``.
            dataset: Name, SHA-256, number of images and classes.
            indices: Poisoned positions of each static phase.
            image_shape: Of the images, for a trigger that has yet to be learnt from them; it is described without its
                pixels.
        """
        shape = poison.trigger.image_shape
        tensors = {} if shape is None else _saved(poison.trigger)
        shape = shape or image_shape
        assert shape is not None, "the poison must be prepared first"
        # Copies: phases may share one set of indices, and safetensors refuses shared memory.
        tensors |= {f"indices.{phase}": chosen.clone() for phase, chosen in (indices or {}).items()}
        return cls(
            trigger={
                "class": type(poison.trigger).__qualname__,
                "arguments": cast(dict[str, Plain], poison.trigger.hyperparameters),
            },
            image_shape=shape,
            label_map={
                "class": type(poison.label_map).__qualname__,
                "arguments": cast(dict[str, Plain], poison.label_map.describe()),
            },
            rate=poison.rate,
            mode=poison.mode,
            clean_label=poison.clean_label,
            cover_rate=poison.cover_rate,
            seed=poison.seed,
            dataset=dataset,
            tensors=tensors,
            cover_classes=list(poison.cover_classes) if poison.cover_classes is not None else None,
            crafting=poison.crafting.facts() if poison.crafting is not None else None,
        )

    def with_trigger(self, trigger: Trigger) -> "PoisonManifest":
        """Return the same record with the tensors that the trigger has now.

        Args:
            trigger: The trigger, which a model may have trained since.
        """
        others = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("trigger.")}
        return replace(self, tensors=others | _saved(trigger))

    def plain(self) -> dict[str, Plain]:
        """Return everything but the tensors as plain values."""
        values = {name: getattr(self, name) for name in CHECKS}
        return copy.deepcopy(values) | {"image_shape": list(self.image_shape)}

    @classmethod
    def from_plain(cls, values: Mapping[str, Plain], tensors: dict[str, Tensor]) -> "PoisonManifest":
        """Rebuild a manifest from :meth:`plain` and its tensors.

        Raises:
            ValueError: If a field is missing or is not what :meth:`plain` writes; the message names it. What a trigger
                makes of its arguments and tensors is checked by :meth:`build_trigger`.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"Expected the poison manifest to be a mapping, but got a {type(values).__name__}.")
        values = LATER_FIELDS | dict(values)
        for name, (expected, is_right) in CHECKS.items():
            if name not in values:
                raise ValueError(f"The poison manifest lacks the field '{name}'.")
            if not is_right(values[name]):
                shown = _REPR.repr(values[name])
                raise ValueError(f"Expected the poison manifest's `{name}` to be {expected}, but got {shown}.")
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
        ):
            raise ValueError("Expected the poison manifest's tensors to be a mapping of names to tensors.")
        fields = {name: values[name] for name in CHECKS}
        fields["image_shape"] = tuple(fields["image_shape"])  # type: ignore[arg-type, assignment]
        return cls(**fields, tensors=tensors)  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` and ``manifest.safetensors`` into ``folder``."""
        tensors, text = {k: v.contiguous() for k, v in self.tensors.items()}, json.dumps(self.plain(), indent=2) + "\n"
        # Each as a whole: a run that is cut here must be able to go on with its trigger.
        with open_atomically(folder / "manifest.safetensors") as file:
            file.write(save(tensors))
        write_text_atomically(folder / "manifest.json", text)

    @classmethod
    def load(cls, folder: Path) -> "PoisonManifest":
        """Read a manifest that :meth:`save` wrote.

        Raises:
            ValueError: If a file is missing or broken; the message names it.
        """
        try:
            values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            return cls.from_plain(values, load_file(folder / "manifest.safetensors"))
        # ValueError: broken JSON, broken UTF-8 or a wrong field.
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise ValueError(f"Cannot read the poison manifest in {folder}: {error}") from error

    def build_trigger(self, known: type[Trigger] | tuple[type[Trigger], ...] | None = None) -> Trigger:
        """Rebuild the trigger with its saved pixels.

        Only this library's triggers are built by name, also where one is a part of another: a file must not decide
        which code runs.

        Args:
            known: The user's own trigger class or classes, if the manifest names such.

        Raises:
            ValueError: If the trigger's class is not known or its tensors do not fit.
        """
        given = known if isinstance(known, tuple) else () if known is None else (known,)
        choices = {cls.__qualname__: cls for cls in given}
        offered = {name: getattr(triggers, name) for name in triggers.__all__}
        choices |= {n: cls for n, cls in offered.items() if issubclass(cls, Trigger) and cls is not Trigger}
        trigger = _unbuilt(self.trigger, choices)
        self.restore(trigger)
        return trigger

    def restore(self, trigger: Trigger) -> None:
        """Give a trigger of the same class and arguments the saved pixels.

        Args:
            trigger: The trigger.

        Raises:
            ValueError: If the tensors do not fit it.
        """
        prefix = "trigger."
        tensors = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        try:
            trigger.restore(self.image_shape, tensors)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"The manifest's trigger {self.trigger['class']} cannot be built: {error}") from error

    def chosen(self, phase: str) -> Tensor | None:
        """Return which training images a phase poisoned.

        Args:
            phase: Name of the phase.

        Returns:
            ``(P,)`` int64 positions, increasing; ``None`` if the phase did not choose its images once.

        Raises:
            ValueError: If the record is broken.
        """
        found = self.tensors.get(f"indices.{phase}")
        if found is None:
            return None
        whole = found.layout is torch.strided and found.dtype == torch.int64 and found.ndim == 1
        # A view that repeats its values may be of any size.
        whole = whole and 8 * found.numel() <= found.untyped_storage().nbytes()
        size = self.dataset.get("images")
        if not whole or not isinstance(size, int) or not len(found) <= size:
            raise ValueError(
                f"Expected the manifest's `indices.{phase}` to be at most {size} int64 positions, but got "
                f"{found.dtype} of shape {tuple(found.shape)}."
            )
        if bool((found.diff() <= 0).any()) or bool(((found < 0) | (found >= size)).any()):
            raise ValueError(f"Expected the manifest's `indices.{phase}` to increase, in [0, {size}).")
        return found

    def check_same_images(self, phase: str, dataset: Mapping[str, str | int]) -> None:
        """Check that :meth:`chosen` are positions in a training set.

        Args:
            phase: Name of the phase, for the message.
            dataset: Of the training set, as in the attribute ``dataset``.

        Raises:
            ValueError: If it is another one, or has images that the model was trained without.
        """
        mine, name = self.dataset, dataset["name"]
        if any(mine.get(fact) != dataset[fact] for fact in ("sha256", "images")):
            raise ValueError(
                f"The poisoned images of phase `{phase}` are known for other data than {name}'s training images. "
                "Use the data, `data.subset` and `data.split_seed` that the model was trained with."
            )
        excluded = dataset.get("excluded", 0)
        if int(mine.get("excluded", 0)) > int(excluded):
            raise ValueError(
                f"The model was trained without {mine['excluded']} of the images that {name} has, which excludes "
                f"{excluded}. Give the `data.exclude` that it was trained with."
            )

    def build_label_map(self) -> LabelMap:
        """Rebuild the label map.

        Raises:
            ValueError: If it is not one of ``lightning_bd.label_maps`` or does not fit the data set's classes.
        """
        name, arguments = self.label_map["class"], self.label_map["arguments"]
        choices = [n for n in label_maps.__all__ if n != "LabelMap"]
        if name not in choices or not isinstance(arguments, dict):
            raise ValueError(f"The manifest's label map {name!r} is not one of {', '.join(choices)}.")
        try:
            rule: LabelMap = getattr(label_maps, str(name))(**arguments)
            rule.validate(int(self.dataset["classes"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The manifest's label map {name} cannot be built: {error}") from error
        return rule

    def differences(self, other: "PoisonManifest", pixels: bool = True) -> list[str]:
        """Say where the attack of ``other`` differs: trigger, its pixels, label map, image shape or mode.

        Args:
            other: The other one.
            pixels: Whether pixels are compared; those of a trigger that has yet to be learnt are not known.
        """
        found = []
        for name in ("trigger", "image_shape", "label_map", "mode"):
            found += differences(describe(getattr(self, name)), describe(getattr(other, name)), name)
        keys = [k for k in sorted(self.tensors.keys() | other.tensors.keys()) if k.startswith("trigger.")]
        if not found and pixels:
            for key in keys:
                mine, theirs = self.tensors.get(key), other.tensors.get(key)
                if mine is None or theirs is None or not torch.equal(mine, theirs):
                    found.append(f"{key}: the pixels differ")
        before, now = (describe((each.crafting or {}).get("attack_images")) for each in (self, other))
        return found + differences(before, now, "crafting.attack_images")


def _saved(trigger: Trigger) -> dict[str, Tensor]:
    return {f"trigger.{name}": tensor.detach().cpu().clone() for name, tensor in trigger.state_dict().items()}


def _unbuilt(recipe: Mapping[str, Plain], choices: Mapping[str, type[Trigger]], depth: int = 0) -> Trigger:
    """Make a trigger and its parts from class names and arguments of an untrusted file."""
    name, arguments = recipe["class"], recipe["arguments"]
    if not isinstance(name, str) or name not in choices or not isinstance(arguments, dict):
        raise ValueError(
            f"The manifest's trigger {name!r} is not one of lightning_bd.triggers ({', '.join(choices)}). "
            "Give a config whose `data.poison.trigger` is that class."
        )
    unknown = sorted(map(str, set(arguments) - set(choices[name].recorded_arguments())))
    if unknown:
        raise ValueError(f"The manifest's trigger {name} cannot be built: it records no argument {unknown[0]!r}.")
    values: dict[str, Any] = dict(arguments)
    if issubclass(choices[name], CompositeTrigger):
        if depth == MAX_DEPTH:
            raise ValueError(f"The manifest's triggers are parts of parts more than {MAX_DEPTH} deep.")
        for key, value in values.items():
            if isinstance(value, list):
                values[key] = [_unbuilt(v, choices, depth + 1) if is_recipe(v) else v for v in value]
            elif is_recipe(value):
                values[key] = _unbuilt(value, choices, depth + 1)
    try:
        return choices[name](**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"The manifest's trigger {name} cannot be built: {error}") from error
