"""The three kinds of detectors, by what they eat; each is a callback."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.hooks import DetectorHooks
from lightning_bd.functional.modes import mode, without_parameter_gradients

__all__ = ("DatasetDetector", "Detector", "FeatureDetector", "InputDetector")


_UNKNOWN = object()


class Detector(DetectorHooks, ABC):
    """Gives each image a score, higher for a more suspicious one.

    Args:
        dataloader: Clean batches to fit on, ``batch[0]`` images and ``batch[1]`` labels; ``None``: that of
            ``trainer.datamodule.clean_fit_dataloader()``.
        layer: Qualified name of the module whose output are the features; ``None``: the input of the last linear layer.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.
    """

    #: In logs, tables and file names.
    name: str
    #: Whether it has to be fitted on clean data before it can score.
    needs_fit: ClassVar[bool] = False
    #: Whether it has to know the layer that makes logits of the features.
    uses_head: ClassVar[bool] = False

    def __init__(
        self,
        dataloader: Iterable[Any] | None = None,
        layer: str | None = None,
        in_distribution: str | None = None,
    ) -> None:
        super().__init__()
        self.dataloader = dataloader
        self.layer = layer
        self.in_distribution = in_distribution
        #: What :meth:`fit` found; empty before.
        self.fitted: dict[str, Tensor] = {}
        # SHA-256 of the weights that it was fitted to.
        self._weights: str | None = None
        # Where the data came from that it was fitted on; a state that was loaded does not say.
        self._source: object = _UNKNOWN

    @property
    def is_ready(self) -> bool:
        """Whether images can be scored."""
        return bool(self.fitted) or not (self.needs_fit or self.uses_head)

    @property
    def runs_model(self) -> bool:
        """Whether the model is run for it, beside the user's own passes."""
        return self.needs_fit

    @property
    def state_key(self) -> str:
        """The class with its settings, so that two variants can stand in one Trainer."""
        settings = {
            key: value
            for key, value in sorted(vars(self).items())
            if key[0] != "_" and key not in ("dataloader", "in_distribution") and _is_plain(value)
        }
        return self._generate_state_key(**settings)

    def state_dict(self) -> dict[str, Any]:
        """Return what was fitted: tensors, and the digest of the weights that it was fitted to."""
        return {"fitted": dict(self.fitted), "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what another of this class and settings was fitted to."""
        self.fitted, self._weights = dict(state_dict["fitted"]), state_dict["weights"]
        self._source = _UNKNOWN

    def forget(self) -> None:
        """Forget what was fitted."""
        self.fitted, self._weights = {}, None

    def note_fit(self, weights: str, source: object) -> None:
        """Remember what it was fitted to.

        Args:
            weights: Digest of the model's weights.
            source: Where the data came from.
        """
        self._weights, self._source = weights, source

    def knows(self, weights: str, source: object) -> bool:
        """Return whether it was fitted to a model of these weights, on data of ``source``.

        Args:
            weights: Digest of the model's weights.
            source: Where the data would come from; not compared where the fit was loaded.
        """
        same_source = self._source is _UNKNOWN or self._source is source
        return bool(self.fitted) and self._weights == weights and same_source

    def _require_fit(self) -> None:
        if not self.is_ready:
            raise RuntimeError(f"`{type(self).__name__}` has to be fitted before it can score: call `fit` first.")


class FeatureDetector(Detector):
    """Base of the detectors that look at features and logits of one forward pass, which all of them share.

    A subclass implements :meth:`_score` and, if it :attr:`needs_fit`, :meth:`_begin`, :meth:`_update` and
    :meth:`_finish`.
    """

    @abstractmethod
    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return scores ``(B,)`` of finite float32 features ``(B, D)`` and logits ``(B, K)``."""

    def _begin(self, head: Head | None) -> None:
        """Start to fit; ``head`` makes the logits of the features, where the model has such a layer."""

    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch; sums are kept in float64, on the batch's device where that has it."""

    def _finish(self) -> dict[str, Tensor]:
        """Return what scoring needs, combined over the processes; drop what was only for fitting."""
        return {}

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor, head: Head | None = None) -> None:
        """Fit on all data at once.

        Args:
            features: ``(N, D)``, floating.
            logits: ``(N, K)``, floating.
            labels: ``(N,)``, integers in ``[0, K)``.
            head: The layer that makes logits of features, for detectors that use it.

        Raises:
            ValueError: If the data are empty, not finite, or lack what the detector needs.
        """
        self.begin_fit(head)
        self.update_fit(features, logits, labels)
        self.finish_fit()

    def begin_fit(self, head: Head | None = None) -> None:
        """Start to fit batch by batch.

        Args:
            head: The layer that makes logits of features, for detectors that use it.
        """
        self.forget()
        self._begin(head)

    def update_fit(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            features: ``(B, D)``, floating.
            logits: ``(B, K)``, floating.
            labels: ``(B,)``, integers in ``[0, K)``.
        """
        if len(features) != len(logits) or len(features) != len(labels):
            raise ValueError(
                f"Expected as many features as logits and labels, but got {len(features)}, {len(logits)} and"
                f" {len(labels)}."
            )
        self._update(_checked(features, "features"), _checked(logits, "logits"), labels)

    def finish_fit(self) -> None:
        """End the fit; all processes call it together."""
        self.fitted = self._finish()

    @torch.no_grad()
    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return how suspicious each image is.

        Args:
            features: ``(B, D)``, floating.
            logits: ``(B, K)``, floating.

        Returns:
            ``(B,)`` float32, higher is more suspicious.

        Raises:
            RuntimeError: If it has to be fitted first.
            ValueError: If features or logits are not finite.
        """
        self._require_fit()
        self.fitted = _on(features.device, self.fitted)
        return self._score(_checked(features, "features"), _checked(logits, "logits")).float()


class InputDetector(Detector):
    """Base of the detectors that run the model on changed images.

    A subclass implements :meth:`_score` and, if it :attr:`needs_fit`, :meth:`_fit`.
    """

    @abstractmethod
    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return scores ``(B,)``; an image's score does not depend on the others of its batch.

        The model is in evaluation mode and its parameters need no gradient; gradients are off, and may be turned on.
        """

    def _fit(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return what scoring needs; the model is left as it is."""
        return {}

    @property
    def runs_model(self) -> bool:
        """Whether the model is run for it, beside the user's own passes."""
        return True

    def explain(self, model: nn.Module, images: Tensor) -> Tensor | None:
        """Return pictures of why images are suspicious, such as masks.

        Args:
            model: Maps images to logits.
            images: ``(B, C, H, W)`` in [0, 1], on the model's device.

        Returns:
            ``(B, 1 or C, H, W)`` in [0, 1], or ``None``: most detectors have none.
        """
        return None

    def fit(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit to a model on clean data.

        Args:
            model: Maps images to logits; left as it is.
            batches: Images ``(B, C, H, W)`` in [0, 1] and labels ``(B,)``, on the model's device.
        """
        self.forget()
        with mode(model, training=False), torch.inference_mode(False):
            self.fitted = self._fit(model, ((images.clone(), labels.clone()) for images, labels in batches))

    def score(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return how suspicious each image is; the model runs in evaluation mode and is left as it was.

        Args:
            model: Maps images to logits.
            images: ``(B, C, H, W)`` in [0, 1], on the model's device.

        Returns:
            ``(B,)`` float32, higher is more suspicious.

        Raises:
            RuntimeError: If it has to be fitted first.
        """
        self._require_fit()
        self.fitted = _on(images.device, self.fitted)
        with (
            mode(model, training=False),
            torch.inference_mode(False),
            torch.no_grad(),
            without_parameter_gradients(model),
        ):
            # Tensors of inference mode have no gradient.
            return self._score(model, images.clone()).detach().float()


class DatasetDetector(Detector):
    """Base of the detectors that look at a whole labelled data set, such as the training set that may be poisoned.

    A subclass implements :meth:`_score`.
    """

    compares_sets = False

    @abstractmethod
    def _score(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return scores ``(N,)`` of finite float32 features ``(N, D)``."""

    @torch.no_grad()
    def score(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return how suspicious each image is beside the others of its label.

        Args:
            features: ``(N, D)``, floating.
            labels: ``(N,)``, integers: the labels that the data set gives, the attacker's among them.

        Returns:
            ``(N,)`` float32, higher is more suspicious.

        Raises:
            ValueError: If features are not finite or their number is not that of the labels.
        """
        if len(features) != len(labels) or not len(features):
            raise ValueError(
                f"Expected as many features as labels, and at least one, but got {len(features)} and {len(labels)}."
            )
        return self._score(_checked(features, "features"), labels).float()


def _checked(values: Tensor, what: str) -> Tensor:
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(
            f"Expected argument `{what}` to be (N, D) floating, but got {tuple(values.shape)} {values.dtype}."
        )
    finite = values.isfinite().all(dim=1)
    if not bool(finite.all()):
        raise ValueError(
            f"Expected finite {what}, but those of {int((~finite).sum())} of {len(values)} images hold NaN or infinity:"
            " the model overflows on them, or its weights are broken."
        )
    return values.float()


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on a device, in float32 where it has no float64."""
    if device.type == "mps":
        tensors = {key: tensor.float() if tensor.dtype == torch.float64 else tensor for key, tensor in tensors.items()}
    return {key: tensor.to(device) for key, tensor in tensors.items()}
