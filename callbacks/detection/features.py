"""Reading penultimate features and logits off a forward pass, by hooks."""

import difflib
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

__all__ = ("FeatureTap", "Features", "Head", "pooled")


class Head(NamedTuple):
    """The linear layer that makes logits of features.

    Attributes:
        weight: ``(K, D)``.
        bias: ``(K,)``; zeros if the layer has none.
    """

    weight: Tensor
    bias: Tensor


class Features(NamedTuple):
    """What a forward pass shows of a batch.

    Attributes:
        features: ``(B, D)`` float32.
        logits: ``(B, K)`` float32.
    """

    features: Tensor
    logits: Tensor


def pooled(features: Tensor) -> Tensor:
    """Average maps ``(B, C, H, W)`` over space, and tokens ``(B, N, D)`` over their number.

    Args:
        features: ``(B, D)`` or one of the above.

    Returns:
        ``(B, D)``.

    Raises:
        ValueError: If the shape is none of these.

    Example:
        >>> pooled(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3])
    """
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    if features.ndim == 3:
        return features.mean(dim=1)
    if features.ndim != 2:
        raise ValueError(f"Expected features (B, D), (B, C, H, W) or (B, N, D), but got {tuple(features.shape)}.")
    return features


class FeatureTap:
    """Keeps the features and logits of a model's last forward pass.

    Features are the input of the last linear layer that gives ``(B, K)``, logits its output; which layer it is shows
    in the first forward pass. With ``layer``, features are that module's output, and where the model has no linear
    layer, logits are the model's output.

    Args:
        model: The classifier; it is not changed, hooks are on it between :meth:`open` and :meth:`close`.
        layer: Qualified name of the module whose output are the features.
        detach: Whether gradients stop at the features.

    Raises:
        MisconfigurationException: If there is no such module.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> tap = FeatureTap(model)
        >>> tap.open()
        >>> logits = model(torch.zeros(5, 1, 2, 2))
        >>> tap.take(5).features.shape, torch.equal(tap.take(5).logits, logits)
        (torch.Size([5, 3]), True)
        >>> tap.close()
    """

    def __init__(self, model: nn.Module, layer: str | None = None, detach: bool = True) -> None:
        self.layer = layer
        self._detach = detach
        self._model = model
        self._named = None if layer is None else _find(model, layer)
        self._head: nn.Linear | None = None
        self._located = False
        self._handles: list[RemovableHandle] = []
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._whole: Tensor | None = None
        self._layer_output: Tensor | None = None
        self._taken: Features | None = None
        self._passes = self._wholes = 0

    @property
    def is_open(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._handles)

    @property
    def head(self) -> Head | None:
        """The last linear layer's weights as they are now, float32; ``None`` if its input is not the features."""
        if self._head is None or self._named is not None:
            return None
        weight = self._head.weight.detach().float()
        bias = self._head.bias
        return Head(weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().float())

    def open(self) -> None:
        """Put the hooks on the model."""
        if self.is_open:
            return
        heads = [self._head] if self._head is not None else [] if self._located else _linear_layers(self._model)
        self._handles = [head.register_forward_hook(self._note_linear) for head in heads]
        self._handles.append(self._model.register_forward_hook(self._note_whole))
        if self._named is not None:
            self._handles.append(self._named.register_forward_hook(self._note_layer))

    def close(self) -> None:
        """Take the hooks off and forget the last pass; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def take(self, count: int) -> Features:
        """Return features and logits of the last forward pass since the last :meth:`skip`.

        Args:
            count: Images of the batch.

        Raises:
            MisconfigurationException: If the pass did not show them, and the message says how to name a layer; or if
                there was more than one.
        """
        if self._taken is None:
            self._taken = self._read(count)
        return self._taken

    def skip(self) -> None:
        """Forget what the last forward pass showed, before the next one."""
        self._forget()

    def _read(self, count: int) -> Features:
        if max(self._passes, self._wholes) > 1:
            raise MisconfigurationException(
                "The model ran several times in this step, so that it is not known whose features count. Detectors need"
                " a step that calls the model once, on the whole batch; callbacks that run it too have to stand behind"
                " them."
            )
        if not self._located:
            self._locate()
        seen = self._layer_output if self._named is not None else self._input
        logits = self._whole if self._head is None or self._named is not None else self._output
        if logits is None:
            logits = self._output
        if seen is None:
            raise MisconfigurationException(self._explain())
        if logits is None or logits.ndim != 2:
            raise MisconfigurationException(
                "No logits (B, K) were seen: the model has no linear layer that gives them, and its `forward` was not"
                " called or gives something else. Call `self(images)` in the step, and let it return logits."
            )
        features = pooled(seen)
        if len(features) != count or len(logits) != count:
            raise MisconfigurationException(
                f"The last forward pass had {len(features)} rows of features and {len(logits)} of logits for a batch of"
                f" {count} images. Detectors need a step that calls the model once, on the whole batch."
            )
        if self._detach:
            features, logits = features.detach(), logits.detach()
        return Features(features.float(), logits.float())

    def _locate(self) -> None:
        """From the first pass on, only the last linear layer matters."""
        if self._layer_output is None and self._input is None and self._whole is None:
            return
        self._check_head()
        self._located = True
        if self.is_open:
            kept = self._input, self._output, self._whole, self._layer_output
            self.close()
            self.open()
            self._input, self._output, self._whole, self._layer_output = kept

    def _check_head(self) -> None:
        """Refuse a last linear layer that does not make the model's logits."""
        whole, output = self._whole, self._output
        if self._named is not None or whole is None or output is None or whole.ndim != 2:
            return
        if whole.shape != output.shape or not _same_logits(output.detach().double(), whole.detach().double()):
            raise MisconfigurationException(
                f"The linear layer that ran last in `{type(self._model).__name__}` does not make its output, so that"
                " it is not known what its features are. Name the layer that gives them: `layer=...`."
            )

    def _explain(self) -> str:
        if self._named is not None:
            return f"The layer `{self.layer}` did not run in the forward pass. Name one that does: `layer=...`."
        if self._located and self._head is not None:
            return "The model's last linear layer did not run in this step, so that there are no features to read."
        leaves = [(n, m) for n, m in self._model.named_modules() if n and not any(True for _ in m.children())]
        names = [name for name, module in leaves if not isinstance(module, Metric)]
        return (
            f"`{type(self._model).__name__}` ran no linear layer that gives logits (B, K), so that it is not known"
            " what its features are. Name the layer that gives them: `layer=...`, such as one of"
            f" {', '.join(names[-5:]) or '-'}."
        )

    def _forget(self) -> None:
        self._input = self._output = self._whole = self._layer_output = self._taken = None
        self._passes = self._wholes = 0

    def _note_linear(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not inputs or output.ndim != 2:
            return
        assert isinstance(module, nn.Linear)
        if not self._located:
            # In the first pass those before the last are the network's body.
            self._passes = self._passes + 1 if module is self._head else 1
            self._head = module
        else:
            self._passes += 1
        self._input, self._output, self._taken = inputs[0], output, None

    def _note_whole(self, _module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            self._wholes += 1
            self._whole, self._taken = output, None

    def _note_layer(self, _module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            self._layer_output, self._taken = output, None


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _find(model: nn.Module, layer: str) -> nn.Module:
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        close = difflib.get_close_matches(layer, modules, n=3)
        close += [name for name in modules if name.endswith(f".{layer}") and name not in close]
        guess = f" Did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""
        raise MisconfigurationException(f"`{type(model).__name__}` has no layer `{layer}`.{guess}")
    found: nn.Module = modules[layer]
    return found


def _same_logits(first: Tensor, second: Tensor) -> bool:
    """Return whether the second are the first, or their (log) softmax, or all of them times one number."""

    def close(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True)

    factor = (first * second).sum() / first.square().sum().clamp_min(1e-12)
    return (
        close(first.log_softmax(dim=1), second.log_softmax(dim=1))
        or close(first.softmax(dim=1), second)
        or (bool(factor > 0) and close(factor * first, second))
    )
