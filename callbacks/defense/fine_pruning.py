"""Fine-Pruning: prune the channels that clean images leave idle, then fine-tune."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.layers import captured_outputs, executed_modules
from lightning_bd.callbacks.defense.training import allowed_epochs, clean_accuracy, not_run, train
from lightning_bd.functional.modes import mode

__all__ = ("FinePruning",)

#: Into how many steps the stages divide the pruning.
STEPS = 20


class FinePruning(Defense):
    """Prunes the last channels in the order of their activity on clean images, then fine-tunes (``fp``).

    A backdoor hides in neurons that clean images leave idle (`Liu et al., 2018 <https://arxiv.org/abs/1805.12185>`_).
    The channels are ordered by their mean absolute value over the training images and pruned from the least active on,
    as long as the clean *validation* accuracy drops by at most ``max_drop``; at least one is kept. Then the model is
    fine-tuned (SGD, cosine schedule); what was pruned stays so.

    Channels are the features that the last linear layer reads, and pruning one writes zeros into its column of that
    layer's weight. Differs from the paper, which prunes the output channels of the last convolution: behind a residual
    sum these cannot be silenced alone. It is the same where the last convolution's activations, rectified and pooled,
    are the features (VGG with one linear layer; in a residual network the output of the last block). With hidden linear
    layers after the convolutions, the last hidden units are pruned.

    Use it with ``max_epochs: 0``: it is the whole defense. The order is in the report's ``tensors``, under the name of
    the last linear layer.

    Args:
        max_drop: Largest tolerated drop of the validation accuracy by pruning, in [0, 1]; 0.01 is one point;
            0.04 is usual.
        epochs: Epochs of fine-tuning, at least 0; 0 only prunes (as `SBL <https://arxiv.org/abs/2407.14738>`_ does).
            The run's cap applies.
        learning_rate: Of fine-tuning, positive; SBL's recipe of fine-tuning: 0.01.
        momentum: Of SGD, in [0, 1).
        weight_decay: Of SGD, at least 0.
        report_unpruned: Only find the order and the number of channels, and leave every weight as it is. Reproduces
            SBL's release, which evaluates the unpruned network after its pruning defense.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> batch = torch.eye(2).reshape(2, 1, 1, 2), torch.arange(2)
        >>> data = DefenderData(lambda epoch: iter([batch]), lambda: iter([batch]), num_classes=2)
        >>> FinePruning(max_drop=1.0, epochs=0).purify(model, data).note
        '1 of 2 channels pruned'
    """

    stage_axis: ClassVar[str] = "share of channels pruned"

    def __init__(
        self,
        max_drop: float = 0.04,
        epochs: int = 50,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        report_unpruned: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= max_drop <= 1:
            raise ValueError(f"Expected argument `max_drop` to be in [0, 1], but got {max_drop}.")
        if epochs < 0:
            raise ValueError(f"Expected argument `epochs` to be a non-negative integer, but got {epochs}.")
        if not learning_rate > 0:
            raise ValueError(f"Expected argument `learning_rate` to be a positive float, but got {learning_rate}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected argument `momentum` to be in [0, 1), but got {momentum}.")
        if not weight_decay >= 0:
            raise ValueError(f"Expected argument `weight_decay` to be a non-negative float, but got {weight_decay}.")
        self.max_drop = max_drop
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.report_unpruned = report_unpruned

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Zero the last linear layer's columns of the idle channels, then fine-tune the model without them."""
        values = {"validation_accuracy_before": clean_accuracy(model, data)}
        name, head = _last_linear(model, next(data.validation())[0])
        if self.epochs and not self.report_unpruned and (skipped := not_run(data)):
            return skipped
        weight = head.weight.detach().clone()
        order = _activity(model, head, data).argsort(stable=True)
        pruned = self._prune(model, head, order, data)
        values["pruned"] = float(len(pruned))
        values["validation_accuracy_pruned"] = clean_accuracy(model, data)
        note = f"{len(pruned)} of {len(order)} channels pruned"
        epochs = 0
        if self.report_unpruned:
            with torch.no_grad():
                head.weight.copy_(weight)
            note = f"unpruned; {note.removesuffix(' pruned')} could be"
        else:
            epochs = allowed_epochs(data, self.epochs)
            self._fine_tune(model, head, pruned, data, epochs)
        values["validation_accuracy"] = clean_accuracy(model, data)
        return Report(epochs, values, note, tensors={name: order.cpu()})

    def stages(self, model: nn.Module, report: Report) -> Iterator[float]:
        """Prune in about 20 equal steps, from no channel to all but one; nothing is fine-tuned."""
        if not report.tensors:
            return
        ((name, order),) = report.tensors.items()
        head = model.get_submodule(name)
        assert isinstance(head, nn.Linear)
        for count in sorted({round(step * (len(order) - 1) / STEPS) for step in range(STEPS + 1)}):
            _zero_columns(head, order[:count])
            yield count / len(order)

    def _prune(self, model: nn.Module, head: nn.Linear, order: Tensor, data: DefenderData) -> Tensor:
        """Prune along ``order`` while the clean validation accuracy allows, and return the pruned channels."""
        # Nothing before the last layer changes: its inputs are computed once.
        inputs = list(_head_inputs(model, head, data.validation(), data))

        def accuracy() -> float:
            correct = total = 0
            for features, labels in inputs:
                with torch.no_grad(), data.forward_context():
                    logits = head(features)
                correct += int((logits.argmax(1) == labels).sum())
                total += len(labels)
            return correct / total

        before = accuracy()
        start = head.weight.detach().clone()
        try:
            for count, channel in enumerate(order[:-1]):
                _zero_columns(head, channel)
                if before - accuracy() > self.max_drop + 1e-9:  # 0.98 - 0.97 is a little more than 0.01
                    with torch.no_grad():
                        head.weight[:, channel] = start[:, channel]
                    return order[:count]
        except BaseException:
            with torch.no_grad():
                head.weight.copy_(start)
            raise
        return order[:-1]

    def _fine_tune(self, model: nn.Module, head: nn.Linear, pruned: Tensor, data: DefenderData, epochs: int) -> None:
        if epochs == 0:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

        def step(closure: Callable[[], Tensor]) -> None:
            closure()
            optimizer.step()
            _zero_columns(head, pruned)

        train(model, data, epochs, optimizer, schedule=schedule, step=step, title="fine-tuning the pruned model")


@torch.no_grad()
def _last_linear(model: nn.Module, images: Tensor) -> tuple[str, nn.Linear]:
    """Return the classifier, the linear layer that makes the logits, and its name."""
    layers = executed_modules(model, images, nn.Linear)
    if layers:
        name, head = list(layers.items())[-1]
        with captured_outputs(head) as outputs, mode(model, training=False):
            logits = model(images)
        if torch.equal(outputs[-1], logits):
            if not head.weight.requires_grad:
                raise NotApplicableError(f"The last linear layer, `{name}`, is frozen: set its `requires_grad`.")
            return name, head
    raise NotApplicableError(
        "Fine-pruning prunes the inputs of the linear layer that makes the logits; the model does not end with one."
    )


@torch.no_grad()
def _head_inputs(
    model: nn.Module, head: nn.Linear, batches: Iterator[tuple[Tensor, Tensor]], data: DefenderData
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the last linear layer reads, ``(B, D)``, in evaluation mode, and the labels ``(B,)``."""
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with mode(model, training=False):
            for images, labels in batches:
                caught.clear()
                # A compiled module would not call the hooks of its parts.
                with data.forward_context(), torch.compiler.set_stance("force_eager"):
                    model(images)
                yield caught[-1], labels
    finally:
        handle.remove()


def _activity(model: nn.Module, head: nn.Linear, data: DefenderData) -> Tensor:
    """Return the mean absolute value of each channel ``(D,)`` over the training images."""
    total, count = torch.zeros(head.in_features, device=head.weight.device), 0
    for features, _ in _head_inputs(model, head, data.train(0), data):
        rows = features.float().abs().flatten(0, -2)
        total += rows.sum(0)
        count += len(rows)
    if count == 0:
        raise MisconfigurationException("The defender has no training images: give the phase a larger split.")
    return total / count


@torch.no_grad()
def _zero_columns(head: nn.Linear, channels: Tensor) -> None:
    """Make a linear layer blind to some of its inputs."""
    head.weight[:, channels.to(head.weight.device)] = 0
