"""Detectors of the pytorch-ood library, as detectors of this one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_bd.callbacks.detection.base import Detector, FeatureDetector, InputDetector
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.processes import gather_over_processes

__all__ = ("PyTorchOOD", "PyTorchOODDetector")


class PyTorchOODDetector(Protocol):
    """What is used of a detector of pytorch-ood, version 0.4 or later."""

    requires_fit: bool

    def predict(self, x: Tensor) -> Tensor:
        """Return scores of images, higher is more suspicious."""

    def to(self, device: torch.device) -> object:
        """Move what it holds."""


class PyTorchOOD(Detector):
    """Adapts a detector of `pytorch-ood <https://pytorch-ood.readthedocs.io>`_, version 0.4 or later.

    What it is given depends on which methods the detector has:

    - ``predict_logits`` or ``predict_features`` (such as ``KLMatching`` or ``Mahalanobis``, made with ``None`` for the
      model or the encoder): logits or features of the forward pass that all detectors share. Those that are fitted are
      given all of the fit data at once, which are kept in memory for that.
    - only ``predict`` (such as ``GradNorm``, ``RankFeat`` or ``MCD``): the images, in [0, 1], which the detector passes
      through the model that it was made with; its normalisation has to be part of that. Where that is not the module
      that is tested or a part of it, put it in evaluation mode yourself. To be fitted, it is given all images at once.

    The object made is a :class:`FeatureDetector` or an :class:`InputDetector` accordingly. It is called ``ood_`` and
    the detector's class in small letters, as in ``ood_klmatching``. One that has to be fitted is fitted anew when
    testing starts, even if it came fitted.

    A fitted one is saved if all that it found are tensors and numbers. Otherwise (``KNN``, ``OpenMax``, ``Gram``,
    ``NACUE``, ``MultiMahalanobis``: objects of other libraries, and lists) a warning says so, nothing of it is saved,
    and it has to be fitted again.

    Args:
        detector: The detector to adapt; it is used itself, not copied.
        dataloader: Clean batches to fit on; ``None``: those of ``trainer.datamodule.clean_fit_dataloader()``.
        layer: Name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If ``detector`` is none of pytorch-ood's, or ``layer`` is given for one that is given images.

    Example:
        >>> from pytorch_ood.detector import Mahalanobis
        >>> detector = PyTorchOOD(Mahalanobis(None))
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 0.0]])
        >>> detector.fit(features, features, labels=torch.tensor([0, 0, 1, 1]))
        >>> scores = detector.score(features, features)
        >>> detector.name, bool(detector.score(features + 9.0, features).min() > scores.max())
        ('ood_mahalanobis', True)
    """

    def __new__(cls, detector: PyTorchOODDetector | None = None, *_: object, **__: object) -> PyTorchOOD:
        """Make one of the kind that the detector is; copies are made without it."""
        if cls is not PyTorchOOD:
            return object.__new__(cls)
        return object.__new__(_OnFeatures if _representation(detector) else _OnImages)

    def __init__(
        self,
        detector: PyTorchOODDetector,
        dataloader: Iterable[Any] | None = None,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        if isinstance(detector, type) or not callable(getattr(detector, "predict", None)):
            raise ValueError(f"Expected argument `detector` to be a detector of pytorch-ood, but got {detector!r}.")
        if layer is not None and isinstance(self, InputDetector):
            raise ValueError(
                f"Expected argument `layer` to be None, since `{type(detector).__name__}` is given the images, but got"
                f" {layer!r}."
            )
        super().__init__(dataloader=dataloader, layer=layer, in_distribution=in_distribution)
        self.detector = detector
        self.name = f"ood_{type(detector).__name__.lower()}"
        self.needs_fit = bool(detector.requires_fit)  # type: ignore[misc]  # of the class in all others
        #: Tells two of one class apart.
        self.settings = _settings(detector)
        self._moved_to: torch.device | None = None
        made_with = _arguments(detector)
        # Not what it was made with: that may be the model's own weights, which change.
        self._initial = {key: value for key, value in _tensors(detector).items() if key.rstrip("!") not in made_with}

    def state_dict(self) -> dict[str, Any]:
        """Return what was fitted, tensors only; nothing, with a warning, where it is not made of tensors."""
        if not self.fitted:
            return super().state_dict()
        other = _neither_tensors_nor_numbers(self.detector)
        if other:
            rank_zero_warn(
                f"What `{type(self.detector).__name__}` was fitted to is not saved, and it has to be fitted again: its"
                f" {', '.join(f'`{name}`' for name in other)} cannot be written as tensors."
            )
            return {"fitted": {}, "weights": None}
        return {"fitted": _tensors(self.detector), "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what another with the same detector and settings was fitted to."""
        super().load_state_dict(state_dict)
        if self.fitted:
            _restore(self.detector, self.fitted)
            self.fitted, self._moved_to = _mark(), None

    def forget(self) -> None:
        """Forget what was fitted; some would start the next fit from it."""
        super().forget()
        _restore(self.detector, self._initial)
        self._moved_to = None

    def _move(self, device: torch.device) -> None:
        if device != self._moved_to:
            self.detector.to(device)
            self._moved_to = device


class _OnFeatures(PyTorchOOD, FeatureDetector):
    """For detectors that look at features or logits."""

    def _begin(self, head: Head | None) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []

    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._device = features.device
        self._rows.append(((features if self._looks_at == "features" else logits).cpu(), labels.cpu()))

    def _finish(self) -> dict[str, Tensor]:
        rows, self._rows = self._rows, []
        if not rows:
            raise ValueError("Expected clean data to fit on, but got no image.")
        inputs, labels = (
            gather_over_processes(torch.cat(parts).to(self._device)).cpu() for parts in zip(*rows, strict=True)
        )
        # Those that compute in torch move the data to where they are; the others need them on the CPU.
        self._move(self._device)
        with _outside_inference(self._device):
            getattr(self.detector, f"fit_{self._looks_at}")(inputs, labels)
        return _mark()

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        self._move(features.device)
        scores: Tensor = getattr(self.detector, f"predict_{self._looks_at}")(
            features if self._looks_at == "features" else logits
        )
        return scores.to(features.device)

    @property
    def _looks_at(self) -> str | None:
        return _representation(self.detector)


class _OnImages(PyTorchOOD, InputDetector):
    """For detectors that run a model of their own."""

    def _fit(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        kept, device = [], torch.device("cpu")
        for images, labels in batches:
            device = images.device
            kept.append((images.cpu(), labels.cpu()))
        if not kept:
            raise ValueError("Expected clean data to fit on, but got no image.")
        self._move(device)
        with _outside_inference(device):
            # A list, since some of them pass over the data several times.
            self.detector.fit(kept)  # type: ignore[attr-defined]
        return _mark()

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        self._move(images.device)
        with _outside_inference(images.device):
            return self.detector.predict(images.detach().requires_grad_()).detach().to(images.device)


@contextmanager
def _outside_inference(device: torch.device) -> Iterator[None]:
    """Let gradients be computed, and leave the stream of random numbers as it was."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        yield


def _representation(detector: object) -> str | None:
    """Say what the detector looks at, if not at images."""
    kinds = (kind for kind in ("logits", "features") if callable(getattr(detector, f"predict_{kind}", None)))
    return next(kinds, None)


def _arguments(detector: object) -> list[str]:
    return [name for name in inspect.signature(type(detector).__init__).parameters if name in vars(detector)]


def _settings(detector: object) -> str:
    values = {name: vars(detector)[name] for name in _arguments(detector)}
    plain = (f"{name}={value!r}" for name, value in values.items() if isinstance(value, (str, int, float)))
    return f"{type(detector).__name__}({', '.join(plain)})"


def _mark() -> dict[str, Tensor]:
    """What is fitted is inside the detector; this only says so."""
    return {"fitted": torch.ones(1)}


def _neither_tensors_nor_numbers(detector: object) -> list[str]:
    """Name what may have been fitted and cannot be written; what the detector was made with, any other has too."""
    known = (Tensor, nn.ParameterDict, bool, int, float, str, type(None), torch.device)
    made_with = _arguments(detector)
    return [
        name
        for name, value in vars(detector).items()
        if name not in made_with and not isinstance(value, known) and not inspect.isroutine(value)
    ]


def _tensors(detector: object) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(detector).items():
        if isinstance(value, Tensor):
            found[name] = value.detach().clone()
        elif isinstance(value, nn.ParameterDict):
            found.update({f"{name}/{key}": part.detach().clone() for key, part in value.items()})
        elif isinstance(value, (bool, int, float)):
            found[f"{name}!"] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return found


def _restore(detector: object, tensors: dict[str, Tensor]) -> None:
    for value in vars(detector).values():
        if isinstance(value, nn.ParameterDict):
            value.clear()
    for key, tensor in tensors.items():
        name, _, part = key.partition("/")
        if part:
            vars(detector)[name][part] = nn.Parameter(tensor.clone(), requires_grad=False)
        elif name[-1] == "!":
            setattr(detector, name[:-1], tensor.item())
        else:
            now = getattr(detector, name, None)
            is_parameter = isinstance(now, nn.Parameter)
            setattr(detector, name, nn.Parameter(tensor.clone()) if is_parameter else tensor.clone())
