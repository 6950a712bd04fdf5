"""BaDExpert: a copy of the model that has unlearnt everything but the backdoor."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from lightning_bd.callbacks.detection.base import InputDetector
from lightning_bd.callbacks.detection.processes import gather_over_processes
from lightning_bd.callbacks.isolation import RandomState
from lightning_bd.functional.draws import keyed_generator, keyed_seed
from lightning_bd.functional.modes import mode
from lightning_bd.functional.replaced import call_with

__all__ = ("BaDExpert",)


class BaDExpert(InputDetector):
    r"""Scores an image by whether a backdoor expert agrees with the model and a clean copy does not (``badexpert``).

    It is fitted on a little clean data (`Xie et al., 2024 <https://openreview.net/forum?id=s56xikpD92>`_). The expert
    is a copy of the model, fine-tuned on wrong labels, each the next class: it forgets what clean images show and keeps
    the backdoor. The auxiliary model, a copy fine-tuned on the right labels, forgets the backdoor. With :math:`b` and
    :math:`a` their probabilities of the model's prediction,

    .. math::
        s(x) = -\min\left(\frac{2 a}{\max(b, 10^{-8})}, \frac{1 - b}{\max(0.5 - a, 10^{-8})}\right)

    Both copies train in training mode; the model itself is left as it is. A share of the clean data is held out, for
    :attr:`threshold`. All clean images are kept in memory while it is fitted.

    Differs from the authors' code in that training images are not augmented, that the threshold is taken on images that
    the copies were not trained on instead of on test images, and that the expert's epoch does not stop early. Every
    parameter is trained, frozen ones too, since they are copies.

    Args:
        expert_lr: Learning rate of the expert, a positive float, for Adam; paper: 1e-4.
        expert_epochs: Its epochs, a positive integer; paper: 1.
        expert_batch_size: Its batch size, a positive integer; authors' code: 128.
        auxiliary_lr: First learning rate of the auxiliary model, a positive float, for SGD with Nesterov's momentum 0.9
            and weight decay 1e-4; divided by 10 after each fifth of the epochs. Authors' code on CIFAR-10: 0.1.
        auxiliary_epochs: Its epochs, a positive integer; authors' code: 10.
        auxiliary_batch_size: Its batch size, a positive integer; authors' code: 64.
        holdout: Share of the clean images that is held out, in (0, 1).
        false_positive_rate: Share of these whose score is above the threshold, in (0, 1); authors' code on CIFAR-10:
            0.01.
        seed: Of what is held out, the order of the images, and what the model draws.
        dataloader: Clean batches to fit on; ``None``: that of ``trainer.datamodule.clean_fit_dataloader()``.
        in_distribution: Name of the test set that the others are compared with; ``None``: the first.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> images, labels = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
        >>> detector = BaDExpert()
        >>> detector.fit(model, [(images, labels)])
        >>> detector.score(model, images).shape
        torch.Size([20])
        >>> detector.threshold < 0
        True
    """

    name = "badexpert"
    needs_fit = True

    def __init__(
        self,
        expert_lr: float = 1e-4,
        expert_epochs: int = 1,
        expert_batch_size: int = 128,
        auxiliary_lr: float = 0.1,
        auxiliary_epochs: int = 10,
        auxiliary_batch_size: int = 64,
        holdout: float = 0.1,
        false_positive_rate: float = 0.01,
        seed: int = 0,
        dataloader: Iterable[Any] | None = None,
        in_distribution: str | None = None,
    ) -> None:
        for name, rate in (("expert_lr", expert_lr), ("auxiliary_lr", auxiliary_lr)):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"Expected argument `{name}` to be a positive float, but got {rate}.")
        for name, number in (
            ("expert_epochs", expert_epochs),
            ("expert_batch_size", expert_batch_size),
            ("auxiliary_epochs", auxiliary_epochs),
            ("auxiliary_batch_size", auxiliary_batch_size),
        ):
            if number < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {number}.")
        for name, share in (("holdout", holdout), ("false_positive_rate", false_positive_rate)):
            if not 0 < share < 1:
                raise ValueError(f"Expected argument `{name}` to be a share in (0, 1), but got {share}.")
        super().__init__(dataloader=dataloader, in_distribution=in_distribution)
        self.expert_lr = expert_lr
        self.expert_epochs = expert_epochs
        self.expert_batch_size = expert_batch_size
        self.auxiliary_lr = auxiliary_lr
        self.auxiliary_epochs = auxiliary_epochs
        self.auxiliary_batch_size = auxiliary_batch_size
        self.holdout = holdout
        self.false_positive_rate = false_positive_rate
        self.seed = seed

    @property
    def threshold(self) -> float:
        """The score above which an image is suspicious: a quantile of the scores of the clean images held out.

        Raises:
            RuntimeError: If it has not been fitted.
        """
        self._require_fit()
        return float(self.fitted["threshold"])

    def _fit(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, labels = _together(batches)
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(
                f"Expected labels in [0, {classes}), the classes of the model, but got {int(labels.min())} to"
                f" {int(labels.max())}."
            )
        order = torch.randperm(len(images), generator=keyed_generator(self.seed, "badexpert")).to(images.device)
        count = min(max(1, round(self.holdout * len(images))), len(images) - 1)
        held_out, rest = order[:count], order[count:]
        fitted: dict[str, Tensor] = {}
        for copy, targets in (("expert", (labels + 1) % classes), ("auxiliary", labels)):
            tensors = self._fine_tuned(copy, model, images[rest], targets[rest])
            fitted |= {f"{copy}.{name}": tensor for name, tensor in tensors.items()}
        with torch.no_grad():
            scores = torch.cat([_compare(model, part, fitted) for part in torch.split(images[held_out], 128)])
        fitted["threshold"] = scores.cpu().double().quantile(1 - self.false_positive_rate)
        return fitted

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        return _compare(model, images, self.fitted)

    def _fine_tuned(self, copy: str, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return parameters and buffers of a copy of the model, trained on these labels."""
        weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        if copy == "expert":
            epochs, size = self.expert_epochs, self.expert_batch_size
            optimizer: Optimizer = Adam(weights.values(), self.expert_lr)
            schedule = StepLR(optimizer, epochs)
        else:
            epochs, size = self.auxiliary_epochs, self.auxiliary_batch_size
            optimizer = SGD(weights.values(), self.auxiliary_lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
            schedule = StepLR(optimizer, max(1, epochs // 5))
        random_state = RandomState(images.device)
        try:
            with mode(model, training=True), torch.enable_grad():
                for epoch in range(epochs):
                    key = (self.seed, "badexpert", copy, epoch)
                    random_state.seed(keyed_seed(*key))
                    for part in _parts(len(images), size, *key):
                        rows = part.to(images.device)
                        optimizer.zero_grad()
                        # The model's own weights and statistics are out of reach.
                        logits = call_with(model, weights | buffers, images[rows])
                        F.cross_entropy(logits, labels[rows]).backward()  # type: ignore[no-untyped-call]
                        optimizer.step()
                    schedule.step()
        finally:
            random_state.restore()
        return {name: tensor.detach() for name, tensor in (weights | buffers).items()}


def _compare(model: nn.Module, images: Tensor, fitted: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of images to a model and its two copies."""
    predicted = model(images).argmax(dim=1, keepdim=True)
    probabilities = []
    for copy in ("expert", "auxiliary"):
        prefix = f"{copy}."
        tensors = {name[len(prefix) :]: tensor for name, tensor in fitted.items() if name.startswith(prefix)}
        logits = call_with(model, tensors, images)
        probabilities.append(logits.float().softmax(dim=1).gather(1, predicted).squeeze(1))
    expert, auxiliary = probabilities
    ratio = 2 * auxiliary / expert.clamp_min(1e-8)
    return -torch.minimum(ratio, (1 - expert) / (0.5 - auxiliary).clamp_min(1e-8))


def _together(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return all images and labels, of all processes."""
    pairs = list(batches)
    if sum(len(images) for images, _ in pairs) < 2:
        raise ValueError("Expected at least two clean images, one to train on and one for the threshold.")
    images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return gather_over_processes(images), gather_over_processes(labels)


def _parts(count: int, size: int, *key: int | str) -> Iterator[Tensor]:
    """Yield the positions of an epoch's batches, shuffled."""
    parts = torch.split(torch.randperm(count, generator=keyed_generator(*key)), size)
    for part in parts:
        # Batch normalisation has no statistics of a single image.
        if len(part) > 1 or len(parts) == 1:
            yield part
