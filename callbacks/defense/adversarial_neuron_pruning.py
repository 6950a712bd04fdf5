"""Adversarial Neuron Pruning: prune the neurons through which small changes of the weights do most harm."""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.layers import executed_modules
from lightning_bd.callbacks.defense.pruning import silence
from lightning_bd.callbacks.defense.training import allowed_epochs, clean_accuracy, not_run, training_batches
from lightning_bd.functional.batch_norm import frozen_running_stats
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.modes import mode
from lightning_bd.functional.replaced import call_with

__all__ = ("AdversarialNeuronPruning",)

#: Candidates, and the positions of the stages: neurons are pruned whose mask is below.
THRESHOLDS = tuple(step / 20 for step in range(20))

_Layer = _BatchNorm | nn.Conv2d | nn.Linear
#: Name of a layer -> relative change of its weight and, if it has one, of its bias; each ``(C,)``.
_Changes = Mapping[str, list[Tensor]]


class AdversarialNeuronPruning(Defense):
    """Prunes the neurons that react most to small adversarial changes of the weights (``anp``).

    A backdoored network breaks under smaller perturbations of its neurons than a clean one, because they switch on the
    neurons of the backdoor (`Wu and Wang, 2021 <https://arxiv.org/abs/2110.14430>`_). Each neuron gets a mask ``m`` in
    [0, 1], learned on clean data with weights ``w`` and biases ``b`` fixed, to minimise

    ``tradeoff * L(m * w, b) + (1 - tradeoff) * max over |d|, |e| <= strength of L((m + d) * w, (1 + e) * b)``

    where ``L`` is the cross-entropy; the maximum is sought by one step along the sign of the gradient from a random
    start. Neurons whose mask ends below a threshold are pruned: their weight becomes 0 and, as in the objective, their
    bias stays. Neurons are the channels of the batch normalisations or, in a model without any, the outputs of
    convolutions and linear layers but for the classifier. Layers with a frozen weight are left alone.

    While the masks are learned, batch normalisation uses the statistics of the batch, as in the released code: with the
    running ones a perturbation grows from layer to layer, and the masks of useful neurons vanish with those of the
    backdoor. The running statistics stay as they are, and dropout is off.

    Differs from the paper: the threshold is chosen on clean validation data, and the perturbation is kept within
    ``strength`` (random start plus step reach twice that in the released code).

    Use it with ``max_epochs: 0``: it is the whole defense. The masks are in the report's ``tensors``, under the names
    of the layers.

    Args:
        strength: Largest relative perturbation of weights and biases, at least 0; paper: 0.4.
        tradeoff: Share of the unperturbed loss, in [0, 1]; paper: 0.2.
        learning_rate: Of SGD on the masks, positive; paper: 0.2.
        momentum: Of SGD on the masks, in [0, 1); paper: 0.9.
        iterations: Number of batches; paper: 2000. The run's cap on epochs caps the passes over the training images.
        threshold: Prune the masks below it, in [0, 1]; paper: 0.2. ``None`` takes the largest of 0, 0.05, ..., 0.95
            whose clean *validation* accuracy drops by at most ``max_drop``.
        max_drop: Largest tolerated drop of the validation accuracy, in [0, 1]; 0.01 is one point. Unused if
            ``threshold`` is given.
        seed: Seed of the random starts.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> batch = torch.eye(2).repeat(4, 1), torch.arange(2).repeat(4)
        >>> data = DefenderData(lambda epoch: iter([batch]), lambda: iter([batch]), num_classes=2)
        >>> report = AdversarialNeuronPruning(iterations=5, threshold=0.0).purify(model, data)
        >>> report.note, report.tensors["1"].shape
        ('0 of 4 neurons pruned, masks below 0', torch.Size([4]))
    """

    stage_axis: ClassVar[str] = "mask threshold"

    def __init__(
        self,
        strength: float = 0.4,
        tradeoff: float = 0.2,
        learning_rate: float = 0.2,
        momentum: float = 0.9,
        iterations: int = 2000,
        threshold: float | None = None,
        max_drop: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"Expected argument `strength` to be a non-negative float, but got {strength}.")
        if not 0 <= tradeoff <= 1:
            raise ValueError(f"Expected argument `tradeoff` to be in [0, 1], but got {tradeoff}.")
        if not learning_rate > 0:
            raise ValueError(f"Expected argument `learning_rate` to be a positive float, but got {learning_rate}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected argument `momentum` to be in [0, 1), but got {momentum}.")
        if iterations < 1:
            raise ValueError(f"Expected argument `iterations` to be a positive integer, but got {iterations}.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"Expected argument `threshold` to be in [0, 1] or None, but got {threshold}.")
        if not 0 <= max_drop <= 1:
            raise ValueError(f"Expected argument `max_drop` to be in [0, 1], but got {max_drop}.")
        self.strength = strength
        self.tradeoff = tradeoff
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.iterations = iterations
        self.threshold = threshold
        self.max_drop = max_drop
        self.seed = seed

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Learn the masks on the training images, then prune the neurons whose mask is below the threshold."""
        before = clean_accuracy(model, data)
        layers = _maskable_layers(model, next(data.validation())[0][:1])
        if skipped := not_run(data):
            return skipped
        masks, epochs = self._learn_masks(model, layers, data)
        threshold = self._choose(model, masks, before, data) if self.threshold is None else self.threshold
        pruned = _prune(model, masks, threshold)
        values = {
            "threshold": threshold,
            "pruned": float(pruned),
            "validation_accuracy_before": before,
            "validation_accuracy": clean_accuracy(model, data),
        }
        total = sum(len(mask) for mask in masks.values())
        note = f"{pruned} of {total} neurons pruned, masks below {threshold:g}"
        return Report(epochs, values, note, tensors={name: mask.cpu() for name, mask in masks.items()})

    def stages(self, model: nn.Module, report: Report) -> Iterator[float]:
        """Prune at the thresholds 0 (nothing), 0.05, ..., 0.95."""
        for threshold in THRESHOLDS if report.tensors else ():
            _prune(model, report.tensors, threshold)
            yield threshold

    def _learn_masks(
        self, model: nn.Module, layers: Mapping[str, _Layer], data: DefenderData
    ) -> tuple[dict[str, Tensor], int]:
        """Return the masks ``(C,)`` by layer and the number of passes over the training images that they took."""
        masks = {
            name: torch.ones(len(layer.weight), device=layer.weight.device, requires_grad=True)
            for name, layer in layers.items()
        }
        free = list(masks.values())
        optimizer = torch.optim.SGD(free, lr=self.learning_rate, momentum=self.momentum)
        generator = keyed_generator(self.seed, "adversarial neuron pruning")
        epochs = 0
        progress = tqdm(total=self.iterations, desc="learning masks", disable=not data.show_progress, leave=False)
        with progress, mode(model, training=False), frozen_running_stats(model):
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
            for epoch, images, labels in _batches(data, self.iterations):
                epochs = epoch + 1

                def loss(changes: _Changes | None, images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    with data.forward_context():
                        logits = call_with(model, _changed_weights(layers, masks, changes), images)
                        return F.cross_entropy(logits, labels)

                worst = self._attack(layers, loss, generator)
                total = self.tradeoff * loss(None) + (1 - self.tradeoff) * loss(worst)
                for mask, gradient in zip(free, torch.autograd.grad(total, free), strict=True):
                    mask.grad = gradient
                optimizer.step()
                with torch.no_grad():
                    for mask in free:
                        mask.clamp_(0, 1)
                progress.update()
        return {name: mask.detach() for name, mask in masks.items()}, epochs

    def _attack(
        self, layers: Mapping[str, _Layer], loss: Callable[[_Changes], Tensor], generator: torch.Generator
    ) -> _Changes:
        """Return relative changes of at most ``strength`` that increase ``loss``."""
        changes: dict[str, list[Tensor]] = {}
        for name, layer in layers.items():
            changes[name] = []
            for _ in range(1 if layer.bias is None else 2):
                start = self.strength * (2 * torch.rand(len(layer.weight), generator=generator) - 1)
                changes[name].append(start.to(layer.weight.device).requires_grad_())
        free = [change for pair in changes.values() for change in pair]
        gradients = torch.autograd.grad(loss(changes), free)
        with torch.no_grad():
            for change, gradient in zip(free, gradients, strict=True):
                change.add_(self.strength * gradient.sign()).clamp_(-self.strength, self.strength)
                change.requires_grad_(False)
        return changes

    def _choose(self, model: nn.Module, masks: Mapping[str, Tensor], before: float, data: DefenderData) -> float:
        """Return the largest threshold that keeps the clean validation accuracy; the weights are put back."""
        weights = {name: model.get_parameter(f"{name}.weight") for name in masks}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        chosen, last, drop = 0.0, 0, 0.0
        try:
            for threshold in THRESHOLDS:
                pruned = _prune(model, masks, threshold)
                if pruned != last:
                    drop = before - clean_accuracy(model, data)
                    last = pruned
                if drop <= self.max_drop + 1e-9:  # 0.98 - 0.97 is a little more than 0.01
                    chosen = threshold
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(kept[name])
        return chosen


def _maskable_layers(model: nn.Module, images: Tensor) -> dict[str, _Layer]:
    """Find the layers whose output channels are the neurons."""
    normalizations = executed_modules(model, images, _BatchNorm)
    layers: dict[str, _Layer] = {name: layer for name, layer in normalizations.items() if _has_weight(layer)}
    if not layers:
        executed: dict[str, nn.Conv2d | nn.Linear] = executed_modules(model, images, (nn.Conv2d, nn.Linear))
        layers = {name: layer for name, layer in list(executed.items())[:-1] if _has_weight(layer)}
    if not layers:
        raise NotApplicableError(
            "Adversarial neuron pruning needs batch normalisation with affine parameters, or convolutions or linear "
            "layers before the classifier; the model has none."
        )
    layers = {name: layer for name, layer in layers.items() if layer.weight.requires_grad}
    if not layers:
        raise NotApplicableError(
            "All layers that adversarial neuron pruning could prune are frozen: set `requires_grad` of some weights."
        )
    return layers


def _has_weight(layer: nn.Module) -> bool:
    """Tell whether the weight is a parameter: not if the layer has none, or computes it from others."""
    return any(name == "weight" for name, _ in layer.named_parameters(recurse=False))


def _changed_weights(
    layers: Mapping[str, _Layer], masks: Mapping[str, Tensor], changes: _Changes | None
) -> dict[str, Tensor]:
    """Return the masked and changed weights and biases under their names in the model."""
    parameters = {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        factor = masks[name] if changes is None else masks[name] + changes[name][0]
        parameters[f"{name}.weight"] = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
        if changes is not None and layer.bias is not None:
            bias = layer.bias.detach()
            parameters[f"{name}.bias"] = (bias * (1 + changes[name][1])).to(bias.dtype)
    return parameters


def _batches(data: DefenderData, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield epoch, images and labels of the first ``count`` training batches, fewer if the run caps the epochs.

    A batch of one image after larger ones is left out.
    """
    done = 0
    for epoch in range(allowed_epochs(data, count)):
        for images, labels in training_batches(data, epoch):
            yield epoch, images, labels
            done += 1
            if done == count:
                return


def _prune(model: nn.Module, masks: Mapping[str, Tensor], threshold: float) -> int:
    """Silence the neurons whose mask is below the threshold, but for their bias; return their number."""
    pruned = 0
    for name, mask in masks.items():
        channels = (mask < threshold).nonzero()[:, 0]
        silence(model.get_submodule(name), channels, keep_bias=True)
        pruned += len(channels)
    return pruned
