"""I-BAU: unlearn the worst universal perturbation, and how it would answer a change of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.training import allowed_epochs, cross_entropy, not_run
from lightning_bd.functional.draws import keyed_generator
from lightning_bd.functional.implicit_gradient import ascent_step, implicit_gradient
from lightning_bd.functional.modes import mode

__all__ = ("ImplicitBackdoorAdversarialUnlearning",)

_Optimizer = Literal["adam", "sgd"]


class ImplicitBackdoorAdversarialUnlearning(Defense):
    r"""Trains the model against the one perturbation that harms it most on all images (``ibau``).

    Solves :math:`\min_\theta \max_{\lVert \delta \rVert_2 \le C} L(f_\theta(x + \delta), y)` on clean data, with one
    :math:`\delta` for all images (`Zeng et al., 2022 <https://arxiv.org/abs/2110.03735>`_): a trigger is such a
    perturbation. Each round seeks :math:`\delta` by projected gradient ascent from 0, a step per batch, then passes
    over the data once, adds it to some of the images, and follows the gradient of the loss at :math:`\delta(\theta)`,
    the part through :math:`\delta` included (:func:`~lightning_bd.functional.implicit_gradient.implicit_gradient`; the
    fixed-point map is one step of the ascent on the same batch). Perturbed images are not clipped to [0, 1].

    The whole model is in evaluation mode, as in the released code: perturbed images stay out of the statistics of
    batch normalisation, and no image feels another's perturbation. Running statistics stay as they are.

    Defaults are the released code's. Differs from it: the bound is in force (there, the line is commented out and
    only ``norm_penalty`` holds); the ascent uses the true labels, as the paper's equation does, not the model's
    predictions; the fixed-point map uses the outer step's batch, not always the first. In a small batch the released
    code perturbs no image at all; here it is at least one. Attention runs in its plain implementation meanwhile, for
    the fused ones have no second derivative. A step costs about ``3 + iterations`` backward passes.

    Use it with ``max_epochs: 0``: it is the whole defense. Pictures of the first and last perturbation are in the
    report, stretched to [0, 1] with 0 as 0.5.

    Args:
        rounds: Rounds of one search and one pass over the data, at least 1; released code: 5, of 50 batches of 100
            images. On less data take more. The run's cap on epochs applies.
        learning_rate: Of the weights, positive; released code: 1e-3.
        optimizer: ``"adam"`` (released code's default) or ``"sgd"``, without momentum and weight decay.
        radius: Radius :math:`C` of the L2 ball, positive; 10, for images of 3x32x32, is 0.18 per value: scale it with
            the square root of the number of values for other sizes.
        ascent_step_size: Step of the ascent, positive; released code: 10.
        ascent_epochs: Passes over the data per ascent, at least 1; released code: 1.
        norm_penalty: Weight of :math:`-\lVert \delta \rVert^2` in the ascent, at least 0; released code: 1e-3.
        iterations: Fixed-point iterations of the implicit gradient, at least 0; released code: 5; 0 leaves
            :math:`\delta`'s answer out (adversarial fine-tuning).
        map_step_size: Step of the ascent in the fixed-point map, positive; released code: 0.1.
        perturbed_share: Share of each batch that gets :math:`\delta`, in [0, 1], if not 0 then at least one image;
            released code: 0.01; paper's equation: 1.
        seed: Seed of the choice of the images to perturb.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
        >>> batch = torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> data = DefenderData(lambda epoch: iter([batch]), lambda: iter([batch]), num_classes=3)
        >>> report = ImplicitBackdoorAdversarialUnlearning(rounds=2, radius=0.01).purify(model, data)
        >>> report.epochs, round(report.values["perturbation_norm"], 4), list(report.images)
        (2, 0.01, ['perturbation_first', 'perturbation_last'])
    """

    def __init__(
        self,
        rounds: int = 5,
        learning_rate: float = 1e-3,
        optimizer: _Optimizer = "adam",
        radius: float = 10.0,
        ascent_step_size: float = 10.0,
        ascent_epochs: int = 1,
        norm_penalty: float = 1e-3,
        iterations: int = 5,
        map_step_size: float = 0.1,
        perturbed_share: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, count in {"rounds": rounds, "ascent_epochs": ascent_epochs}.items():
            if count < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {count}.")
        positive = {
            "learning_rate": learning_rate,
            "radius": radius,
            "ascent_step_size": ascent_step_size,
            "map_step_size": map_step_size,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"Expected argument `{name}` to be a positive float, but got {value}.")
        if optimizer not in get_args(_Optimizer):
            raise ValueError(
                f"Expected argument `optimizer` to be one of {get_args(_Optimizer)}, but got {optimizer!r}."
            )
        if not norm_penalty >= 0:
            raise ValueError(f"Expected argument `norm_penalty` to be a non-negative float, but got {norm_penalty}.")
        if iterations < 0:
            raise ValueError(f"Expected argument `iterations` to be a non-negative integer, but got {iterations}.")
        if not 0 <= perturbed_share <= 1:
            raise ValueError(f"Expected argument `perturbed_share` to be in [0, 1], but got {perturbed_share}.")
        self.rounds = rounds
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.radius = radius
        self.ascent_step_size = ascent_step_size
        self.ascent_epochs = ascent_epochs
        self.norm_penalty = norm_penalty
        self.iterations = iterations
        self.map_step_size = map_step_size
        self.perturbed_share = perturbed_share
        self.seed = seed

    def purify(self, model: nn.Module, data: DefenderData) -> Report:
        """Alternate between the worst perturbation of ``model`` and steps in place against it."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise NotApplicableError("I-BAU trains the model, but every parameter is frozen: unfreeze some.")
        if skipped := not_run(data):
            return skipped
        rounds = allowed_epochs(data, self.rounds)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.SGD
        optimizer = kind(parameters, lr=self.learning_rate)
        generator = keyed_generator(self.seed, "implicit_backdoor_adversarial_unlearning")
        report = Report(rounds)
        # Compiled modules have no second derivative.
        eager = torch.compiler.set_stance("force_eager")
        with _dropped_gradients(parameters), mode(model, training=False), sdpa_kernel(SDPBackend.MATH), eager:
            for number in tqdm(range(rounds), "I-BAU", disable=not data.show_progress, leave=False):
                perturbation = self._worst_perturbation(model, data, number)
                picture = _picture(perturbation)
                report.images.setdefault("perturbation_first", picture)
                report.images["perturbation_last"] = picture
                report.values["perturbation_norm"] = torch.linalg.vector_norm(perturbation).item()
                for images, labels in data.train(number):
                    perturbed = self._choose(images, generator)
                    gradients = self._gradient(model, data, images, labels, perturbation, perturbed, parameters)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        return report

    def _worst_perturbation(self, model: nn.Module, data: DefenderData, epoch: int) -> Tensor:
        """Climb from zero, one step per batch; return ``(C, H, W)``."""
        found: Tensor | None = None
        for _ in range(self.ascent_epochs):
            for images, labels in data.train(epoch):
                start = torch.zeros_like(images[0]) if found is None else found
                found = self._step(model, data, images, labels, start.requires_grad_(), self.ascent_step_size)
        if found is None:
            raise MisconfigurationException("The defender has no training images: give the phase a larger split.")
        return found

    def _step(
        self,
        model: nn.Module,
        data: DefenderData,
        images: Tensor,
        labels: Tensor,
        perturbation: Tensor,
        step_size: float,
        create_graph: bool = False,
    ) -> Tensor:
        """Take one step of the ascent on one batch, all of it perturbed."""

        def objective(perturbation: Tensor) -> Tensor:
            with data.forward_context():
                loss = cross_entropy(model, images + perturbation, labels)
            return loss - self.norm_penalty * perturbation.square().sum()

        return ascent_step(objective, perturbation, step_size, self.radius, create_graph=create_graph)

    def _gradient(
        self,
        model: nn.Module,
        data: DefenderData,
        images: Tensor,
        labels: Tensor,
        perturbation: Tensor,
        perturbed: Tensor,
        parameters: Sequence[nn.Parameter],
    ) -> list[Tensor]:
        """Gradient of one batch's loss, through the perturbation too."""

        def outer_loss(perturbation: Tensor) -> Tensor:
            with data.forward_context():
                return cross_entropy(model, images + perturbed * perturbation, labels)

        def fixed_point_map(perturbation: Tensor) -> Tensor:
            return self._step(model, data, images, labels, perturbation, self.map_step_size, create_graph=True)

        return implicit_gradient(outer_loss, fixed_point_map, perturbation, parameters, self.iterations)

    def _choose(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the images to perturb; return 1 for these and 0 for the others, ``(B, 1, 1, 1)``."""
        count = round(self.perturbed_share * len(images)) or int(self.perturbed_share > 0)
        chosen = torch.zeros(len(images), 1, 1, 1)
        chosen[torch.randperm(len(images), generator=generator)[:count]] = 1.0
        return chosen.to(images)


@contextmanager
def _dropped_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Leave no gradients when the block ends."""
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None


def _picture(perturbation: Tensor) -> Tensor:
    """Stretch to [0, 1], 0 becoming 0.5."""
    largest = perturbation.abs().max().clamp_min(torch.finfo(perturbation.dtype).tiny)
    return (0.5 + 0.5 * perturbation / largest).detach().cpu()
