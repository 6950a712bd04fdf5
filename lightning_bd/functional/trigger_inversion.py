"""Search for the smallest patch that sends every image to a class, and for classes where it is too small."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ("TriggerInversion", "anomaly_indices", "stamp")

_MAX_COST = 1e6


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Blend a pattern into images: ``(1 - mask) * images + mask * pattern``.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        mask: Opacity in [0, 1], ``(1, H, W)`` or anything that broadcasts.
        pattern: ``(C, H, W)`` in [0, 1], or anything that broadcasts.

    Example:
        >>> stamp(torch.zeros(1, 1, 1, 2), torch.tensor([[[0.0, 0.5]]]), torch.ones(1, 1, 2))
        tensor([[[[0.0000, 0.5000]]]])
    """
    return (1 - mask) * images + mask * pattern


def anomaly_indices(norms: Tensor) -> Tensor:
    r"""How far each number is from the median: :math:`|n - \mathrm{median}| / (1.4826 \, \mathrm{MAD})`.

    MAD is the median absolute deviation; for normally distributed numbers the denominator estimates the standard
    deviation, and the paper (`Wang et al., 2019 <https://doi.org/10.1109/SP.2019.00031>`_) calls an index above 2 an
    outlier. A MAD below a millionth of the median counts as that much: equal numbers have index 0.

    Args:
        norms: ``(K,)`` non-negative numbers.

    Returns:
        ``(K,)`` indices, non-negative and finite.

    Example:
        >>> anomaly_indices(torch.tensor([10.0, 11.0, 12.0, 13.0, 2.0]))
        tensor([0.6745, 0.0000, 0.6745, 1.3490, 6.0704])
    """
    median = norms.quantile(0.5)
    deviations = (norms - median).abs()
    spread = 1.4826 * deviations.quantile(0.5)
    return deviations / spread.clamp_min(1e-6 * median.item()).clamp_min(torch.finfo(norms.dtype).tiny)


class TriggerInversion:
    r"""Optimises one trigger for each of K classes, all at once and independently of each other.

    Minimises :math:`\mathrm{CE}(f((1 - m) x + m p), t) + \lambda \lVert m \rVert_1` over a mask :math:`m` and a
    pattern :math:`p`, both :math:`(\tanh(\cdot) + 1) / 2`, with Adam
    (`Wang et al., 2019 <https://doi.org/10.1109/SP.2019.00031>`_). The weight :math:`\lambda` is each class's own: 0
    until the trigger has worked for ``patience`` steps, then ``cost``; multiplied by ``cost_multiplier`` after
    ``patience`` steps that succeed, divided by its power 1.5 after as many that fail. A step is any number of
    :meth:`update` and then one :meth:`adapt`. Kept is the smallest mask that succeeded, or the last of all if none
    did. A class stops when its weight went both ways and ``early_stop`` steps gave no smaller mask.

    Differs from the authors' code in that the norm compared is the kept mask's, not its mean over the step.

    Args:
        masks: Starting masks ``(K, 1, H, W)`` in [0, 1], one for each class.
        patterns: Starting patterns ``(K, C, H, W)`` in [0, 1].
        targets: ``(K,)`` int64, the classes.
        learning_rate: Of Adam with betas (0.5, 0.9), positive; the authors' code: 0.1.
        cost: First positive weight of the mask's norm, in loss per pixel; the authors' code: 1e-3.
        cost_multiplier: Above 1; the authors' example: 2.
        patience: Steps before the weight changes, at least 1; the authors' example: 5.
        success_threshold: Share of images that must go to the class, in (0, 1]; usually 0.99.
        early_stop: Steps without a smaller mask before a class stops, at least 1; the authors' example: 25.
        images_per_pass: Most images times classes in one forward pass, for memory; one class goes alone if need be.

    Attributes:
        masks: The masks kept so far, ``(K, 1, H, W)``.
        patterns: Their patterns, ``(K, C, H, W)``.
        success: ``(K,)``, the share of images that went to the class in the step that they were kept in.
        reached: ``(K,)`` bool, whether ``success_threshold`` was.

    Example:
        A model whose class 1 is the brightness of the first pixel:

        >>> model = lambda images: torch.stack([torch.zeros(len(images)), 20 * images[:, 0, 0, 0] - 10], dim=1)
        >>> half = torch.full((1, 1, 2, 2), 0.5)
        >>> inversion = TriggerInversion(half, half, torch.tensor([1]), patience=2)
        >>> for _ in range(100):
        ...     inversion.update(model, torch.zeros(4, 1, 2, 2))
        ...     finished = inversion.adapt()
        >>> inversion.success.item(), (inversion.masks[0, 0] > 0.1).tolist()
        (1.0, [[True, False], [False, False]])
    """

    def __init__(
        self,
        masks: Tensor,
        patterns: Tensor,
        targets: Tensor,
        *,
        learning_rate: float = 0.1,
        cost: float = 1e-3,
        cost_multiplier: float = 2.0,
        patience: int = 5,
        success_threshold: float = 0.99,
        early_stop: int = 25,
        images_per_pass: int = 2048,
    ) -> None:
        self.targets = targets
        self.first_cost = cost
        self.cost_multiplier = cost_multiplier
        self.patience = patience
        self.success_threshold = success_threshold
        self.early_stop = early_stop
        self.images_per_pass = images_per_pass
        self._raw = [_to_raw(masks), _to_raw(patterns)]
        self._optimizer = torch.optim.Adam(self._raw, lr=learning_rate, betas=(0.5, 0.9))
        self.masks, self.patterns = masks.clone(), patterns.clone()
        count = len(targets)
        # Bookkeeping is on the CPU: one transfer per step, none per batch.
        self.success = torch.zeros(count)
        self.reached = torch.zeros(count, dtype=torch.bool)
        self.costs = torch.zeros(count)
        self.active = torch.ones(count, dtype=torch.bool)
        self._norms = torch.full((count,), torch.inf)
        self._good, self._bad, self._stale = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
        self._raised, self._lowered = (torch.zeros(count, dtype=torch.bool) for _ in range(2))
        self._hits = torch.zeros(count, device=masks.device)
        self._seen = 0

    def update(self, model: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Take one step of Adam for every class that has not stopped.

        Args:
            model: Maps images ``(B, C, H, W)`` in [0, 1] to logits, each image's on its own: batch normalisation must
                be in evaluation mode. Its weights get no gradient.
            images: ``(B, C, H, W)`` in [0, 1]; clean.
        """
        classes = self.active.nonzero()[:, 0]
        gradients = [torch.zeros_like(raw) for raw in self._raw]
        for part in torch.split(classes, max(1, self.images_per_pass // len(images))):
            chosen = part.to(images.device)
            raw = [tensor.detach()[chosen].requires_grad_() for tensor in self._raw]
            with torch.enable_grad():
                mask, pattern = (_from_raw(tensor) for tensor in raw)
                stamped = stamp(images, mask[:, None], pattern[:, None])
                logits = model(stamped.flatten(0, 1)).float()
                wanted = self.targets[chosen].repeat_interleave(len(images))
                # The sum over classes of each one's mean: no class feels another.
                loss = F.cross_entropy(logits, wanted, reduction="sum") / len(images)
                loss = loss + (self.costs[part].to(images.device) * mask.sum(dim=(1, 2, 3))).sum()
            found = torch.autograd.grad(loss, raw)
            for gradient, piece in zip(gradients, found, strict=True):
                gradient[chosen] = piece
            self._hits[chosen] += (logits.argmax(1) == wanted).view(len(part), -1).sum(1)
        self._seen += len(images)
        for raw_tensor, gradient in zip(self._raw, gradients, strict=True):
            raw_tensor.grad = gradient
        self._optimizer.step()

    def adapt(self) -> bool:
        """End a step: keep better masks, change the weights of the norm, stop classes.

        Returns:
            Whether every class has stopped.

        Raises:
            RuntimeError: If there was no :meth:`update` since the last call.
        """
        if self._seen == 0:
            raise RuntimeError("`adapt` ends a step: call `update` before it.")
        success = self._hits.cpu() / self._seen
        self._hits.zero_()
        self._seen = 0
        self._keep(success)
        self._change_costs(success >= self.success_threshold)
        stopped = self._raised & self._lowered & (self._stale >= self.early_stop)
        self.active &= ~stopped
        return not bool(self.active.any())

    def _keep(self, success: Tensor) -> None:
        masks, patterns = (_from_raw(raw.detach()) for raw in self._raw)
        norms = masks.sum(dim=(1, 2, 3)).cpu()
        works = success >= self.success_threshold
        smaller = self.active & works & (norms < self._norms)
        # Until a class succeeds the last trigger stands for it.
        kept = smaller | (self.active & ~self.reached & ~works)
        for old, new in ((self.masks, masks), (self.patterns, patterns)):
            where = kept.to(old.device)
            old[where] = new[where]
        self.success[kept] = success[kept]
        self._norms[smaller] = norms[smaller]
        self.reached |= smaller
        self._stale = torch.where(self.reached & ~smaller, self._stale + 1, 0)

    def _change_costs(self, works: Tensor) -> None:
        self._good = torch.where(works, self._good + 1, 0)
        self._bad = torch.where(works, 0, self._bad + 1)
        up, down = self._good >= self.patience, self._bad >= self.patience
        self._good[up] = 0
        self._bad[down] = 0
        started = self.costs > 0
        higher = torch.where(started, self.costs * self.cost_multiplier, self.first_cost)
        self.costs = torch.where(up, higher.clamp_max(_MAX_COST), self.costs)
        self.costs = torch.where(down, self.costs / self.cost_multiplier**1.5, self.costs)
        self._raised |= up & started
        self._lowered |= down & started


def _to_raw(values: Tensor) -> Tensor:
    """Invert :func:`_from_raw`; 0 and 1 would be infinite."""
    return torch.atanh((2 * values - 1).clamp(-1 + 1e-6, 1 - 1e-6))


def _from_raw(raw: Tensor) -> Tensor:
    return (torch.tanh(raw) + 1) / 2
