"""Neural Cleanse: invert a trigger for every class, and unlearn those that are too small."""

from collections.abc import Iterator

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.training import allowed_epochs, not_run, train
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.modes import mode
from lightning_bd.functional.trigger_inversion import TriggerInversion, anomaly_indices, stamp

__all__ = ("NeuralCleanse",)

_OUTLIER = 2.0
_ALL_PICTURES = 20
_SMALLEST_PICTURES = 10
_NAMED = 5


class NeuralCleanse(Defense):
    """Finds the classes that a small patch sends every image to, and trains the model to ignore the patch (``nc``).

    A backdoor is a shortcut: fewer pixels lead to the attacker's class than to any other
    (`Wang et al., 2019 <https://doi.org/10.1109/SP.2019.00031>`_). For every class the smallest mask with a pattern is
    sought that sends clean images to it; see
    :class:`~lightning_bd.functional.trigger_inversion.TriggerInversion`. A class is flagged whose mask's norm is below
    the median by more than 2 of its :func:`~lightning_bd.functional.trigger_inversion.anomaly_indices`. If there are
    any, the model is fine-tuned on clean data, ``unlearn_share`` of the images stamped with a flagged class's inverted
    trigger and true label. If there is none the model is left as it is, and the report's note says "not detected".

    Pictures of mask, pattern and their product are in the report: of all classes up to 20, else of the flagged ones
    and the ten with the smallest masks. All classes are inverted at once; weights get no gradient. Inversions cut short
    or with few images per step are noisy and flag clean classes: look at ``unsettled_classes`` in the report's values.

    Differs from the paper: a class for which no trigger worked is not flagged, whatever its last mask; the share of
    stamped images holds on average. Finds small static patches; triggers that cover the image or differ from image
    to image escape it. Use it with ``max_epochs: 0``: it is the whole defense.

    Args:
        steps: Most steps of the inversion, at least 1; after each the weight of the norm is adapted. Authors' example:
            1000, most classes stop before. The run's cap on epochs caps the passes over the training images.
        images_per_step: Images in a step, at least 1, rounded up to whole batches; authors' example: 1000.
        inversion_learning_rate: Of Adam on mask and pattern, positive; authors' example: 0.1.
        cost: First positive weight of the mask's norm, positive; authors' example: 1e-3.
        cost_multiplier: Factor by which it changes, above 1; authors' example: 2.
        patience: Steps before it changes, at least 1; authors' example: 5. A class stops after 5 times as many without
            a smaller mask.
        success_threshold: Share of images that a trigger must send to its class, in (0, 1]; usually 0.99.
        learning_rate: Of SGD in unlearning, positive. Settled on digits with attack success in view; 0.01 took 4 points
            of clean accuracy there in one epoch.
        momentum: Of SGD, in [0, 1).
        max_epochs: Epochs of unlearning, at least 1; 1, as it is usually described (the paper's text was not at
            hand). The run's cap applies.
        unlearn_share: Share of images that get the trigger, in [0, 1]; 0.2, as it is usually described.
        images_per_pass: Most images times classes in one forward pass, at least 1; lower it if memory runs out.
        seed: Seed of the starting masks and of the images to stamp.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
        >>> batch = torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> data = DefenderData(lambda epoch: iter([batch]), lambda: iter([batch]), num_classes=3)
        >>> report = NeuralCleanse(steps=20).purify(model, data)
        >>> sorted(report.images)[:3], report.images["class_0_trigger"].shape
        (['class_0_mask', 'class_0_pattern', 'class_0_trigger'], torch.Size([1, 2, 2]))
    """

    def __init__(
        self,
        steps: int = 1000,
        images_per_step: int = 1000,
        inversion_learning_rate: float = 0.1,
        cost: float = 1e-3,
        cost_multiplier: float = 2.0,
        patience: int = 5,
        success_threshold: float = 0.99,
        learning_rate: float = 0.003,
        momentum: float = 0.9,
        max_epochs: int = 1,
        unlearn_share: float = 0.2,
        images_per_pass: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__()
        integers = {
            "steps": steps,
            "images_per_step": images_per_step,
            "patience": patience,
            "max_epochs": max_epochs,
            "images_per_pass": images_per_pass,
        }
        for name, integer in integers.items():
            if integer < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {integer}.")
        rates = {"inversion_learning_rate": inversion_learning_rate, "cost": cost, "learning_rate": learning_rate}
        for name, rate in rates.items():
            if not rate > 0:
                raise ValueError(f"Expected argument `{name}` to be a positive float, but got {rate}.")
        if not cost_multiplier > 1:
            raise ValueError(f"Expected argument `cost_multiplier` to be a float above 1, but got {cost_multiplier}.")
        if not 0 < success_threshold <= 1:
            raise ValueError(f"Expected argument `success_threshold` to be in (0, 1], but got {success_threshold}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected argument `momentum` to be in [0, 1), but got {momentum}.")
        if not 0 <= unlearn_share <= 1:
            raise ValueError(f"Expected argument `unlearn_share` to be in [0, 1], but got {unlearn_share}.")
        self.steps = steps
        self.images_per_step = images_per_step
        self.inversion_learning_rate = inversion_learning_rate
        self.cost = cost
        self.cost_multiplier = cost_multiplier
        self.patience = patience
        self.success_threshold = success_threshold
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.max_epochs = max_epochs
        self.unlearn_share = unlearn_share
        self.images_per_pass = images_per_pass
        self.seed = seed

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Look for small triggers; if there are any, fine-tune ``model`` in place to ignore them."""
        if data.num_classes < 3:
            raise NotApplicableError(
                f"NeuralCleanse looks for outliers among the classes and needs at least 3, not {data.num_classes}."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise NotApplicableError("NeuralCleanse trains the model, but every parameter is frozen: unfreeze some.")
        if skipped := not_run(data):
            return skipped
        inversion, steps = self._invert(model, data)
        norms = inversion.masks.sum(dim=(1, 2, 3)).cpu()
        indices = anomaly_indices(norms)
        below = norms < norms.quantile(0.5)
        flagged = (below & (indices > _OUTLIER) & inversion.reached).nonzero()[:, 0]
        epochs = 0
        if len(flagged):
            epochs = allowed_epochs(data, self.max_epochs)
            self._unlearn(model, data, inversion.masks[flagged], inversion.patterns[flagged], epochs)
        values = {
            "flagged": float(len(flagged)),
            "inversion_steps": float(steps),
            "unsettled_classes": float(inversion.active.sum()),
        }
        for name, numbers in (("anomaly_index", indices), ("mask_norm", norms), ("success", inversion.success)):
            values |= {f"{name}_{label}": number for label, number in enumerate(numbers.tolist())}
        note = _note(flagged.tolist(), indices, below, inversion.reached)
        return Report(epochs, values, note, _pictures(inversion, norms, flagged))

    def _invert(self, model: nn.Module, data: DefenderData) -> tuple[TriggerInversion, int]:
        """Invert a trigger for every class; return them and the number of steps."""
        stream = _stream(data)
        images = next(stream, None)
        if images is None:
            raise MisconfigurationException("The defender has no training images: give the phase a larger split.")
        dtype = images.dtype  # Of a run with weights of half precision; masks and patterns have the full one.
        masks, patterns = self._start(data.num_classes, images)
        inversion = TriggerInversion(
            masks,
            patterns,
            torch.arange(data.num_classes, device=images.device),
            learning_rate=self.inversion_learning_rate,
            cost=self.cost,
            cost_multiplier=self.cost_multiplier,
            patience=self.patience,
            success_threshold=self.success_threshold,
            early_stop=5 * self.patience,
            images_per_pass=self.images_per_pass,
        )

        def logits(stamped: Tensor) -> Tensor:
            with data.forward_context():
                found: Tensor = model(stamped.to(dtype))
            return found

        taken = 0
        with mode(model, training=False):
            for _ in tqdm(range(self.steps), "inverting triggers", disable=not data.show_progress, leave=False):
                seen = 0
                while images is not None and seen < self.images_per_step:
                    inversion.update(logits, images)
                    seen += len(images)
                    images = next(stream, None)
                taken += 1
                if inversion.adapt() or images is None:
                    break
        return inversion, taken

    def _start(self, count: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the masks and patterns to start from, uniform; a class's do not depend on how many there are."""
        channels, height, width = images.shape[1:]
        drawn = torch.stack(
            [
                torch.rand(1 + channels, height, width, generator=keyed_generator(self.seed, "neural_cleanse", label))
                for label in range(count)
            ]
        ).to(images.device)
        return drawn[:, :1], drawn[:, 1:]

    def _unlearn(self, model: nn.Module, data: DefenderData, masks: Tensor, patterns: Tensor, epochs: int) -> None:
        """Fine-tune on clean images, some of them with one of the triggers, all with their true labels."""
        generator = keyed_generator(self.seed, "neural_cleanse", "unlearn")

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            stamped = torch.rand(len(images), generator=generator) < self.unlearn_share
            which = torch.randint(len(masks), (int(stamped.sum()),), generator=generator).to(images.device)
            images = images.clone()
            stamped = stamped.to(images.device)
            images[stamped] = stamp(images[stamped], masks[which], patterns[which]).to(images.dtype)
            return F.cross_entropy(model(images), labels)

        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=self.momentum)
        train(model, data, epochs, optimizer, loss, title="unlearning triggers")


def _stream(data: DefenderData) -> Iterator[Tensor]:
    """Yield batches of training images, epoch after epoch, up to the run's cap."""
    epoch = 0
    while data.epoch_limit is None or epoch < data.epoch_limit:
        empty = True
        for images, _ in data.train(epoch):
            empty = False
            yield images
        if empty:
            return
        epoch += 1


def _note(flagged: list[int], indices: Tensor, below: Tensor, reached: Tensor) -> str:
    if flagged:
        largest = indices[flagged].max().item()
        named = ", ".join(map(str, flagged)) if len(flagged) <= _NAMED else f"{len(flagged)} of {len(indices)}"
        note = f"detected: class {named} (largest anomaly index {largest:.1f})"
    else:
        # Masks above the median may be outliers too, but are no sign of a backdoor.
        largest = indices[below & reached].max().item() if bool((below & reached).any()) else 0.0
        note = f"not detected (largest anomaly index {largest:.1f})"
    missing = int((~reached).sum())
    return f"{note}; no trigger found for {missing} classes" if missing else note


def _pictures(inversion: TriggerInversion, norms: Tensor, flagged: Tensor) -> dict[str, Tensor]:
    shown = list(range(len(norms)))
    if len(norms) > _ALL_PICTURES:
        shown = sorted({*flagged.tolist(), *norms.argsort(stable=True)[:_SMALLEST_PICTURES].tolist()})
    pictures: dict[str, Tensor] = {}
    for label in shown:
        mask, pattern = inversion.masks[label].cpu(), inversion.patterns[label].cpu()
        pictures |= {
            f"class_{label}_mask": mask,
            f"class_{label}_pattern": pattern,
            f"class_{label}_trigger": mask * pattern,
        }
    return pictures
