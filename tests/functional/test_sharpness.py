"""Sharpness against explicit Hessians, closed forms and the trust region problem's exact solution."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from lightning_bd.functional.perturbations import asam_perturbation, sam_perturbation
from lightning_bd.functional.sharpness import max_loss_in_ball, top_hessian_eigenvalue

Batches = list[tuple[Tensor, Tensor]]


def make_net() -> nn.Sequential:
    """A network with running statistics, dropout and a layer in a mode of its own, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(18, 3)
        ).double()
        net(torch.rand(8, 1, 5, 5, dtype=torch.float64))
    net[2].eval()
    return net


def make_batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(size, 1, 5, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in (6, 3)
    ]


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def explicit_hessian(model: nn.Module, batches: Batches) -> Tensor:
    """The Hessian as a matrix, for the parameters that require a gradient."""
    model.eval()
    images, labels = joined(batches)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in parameters.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])  # type: ignore[no-untyped-call]
        weights = {name: part.view(shape) for name, part, shape in zip(parameters, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (images,)), labels)

    matrix: Tensor = hessian(loss, torch.cat([p.detach().flatten() for p in parameters.values()]))  # type: ignore[no-untyped-call]
    return matrix


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [module.training for module in model.modules()], torch.get_rng_state()


def assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], list[bool], Tensor]) -> None:
    state, modes, random_state = snapshot(model)
    assert modes == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())
    assert torch.equal(random_state, before[2])
    assert all(parameter.grad is None for parameter in model.parameters())


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def quadratic(curvatures: list[float], weights: list[float]) -> tuple[nn.Module, Batches]:
    r"""A network and data on which ``half_square`` is :math:`\sum_i h_i w_i^2 / 2`; curvatures at least 0."""
    model = nn.Linear(len(weights), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    images = torch.tensor(curvatures, dtype=torch.float64).mul(len(curvatures)).sqrt().diag()
    return model, [(images, torch.zeros(len(weights), 1, dtype=torch.float64))]


class FailsAt:
    """Counts the calls of a loss and fails at one of them."""

    def __init__(self, call: int) -> None:
        self.calls, self.call = 0, call

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise RuntimeError("out of memory")
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("frozen", [False, True])
def test_top_eigenvalue_is_that_of_the_explicit_hessian(frozen: bool) -> None:
    model, twin, batches = make_net(), make_net(), make_batches()
    for net in (model, twin):
        net[0].requires_grad_(not frozen)
    eigenvalues = torch.linalg.eigvalsh(explicit_hessian(twin, batches))
    reference = eigenvalues[eigenvalues.abs().argmax()].item()
    before = snapshot(model)
    value, converged, residual, iterations = top_hessian_eigenvalue(model, batches, 500, 1e-7)
    assert_untouched(model, before)
    assert converged
    assert residual <= 1e-7
    assert 5 < iterations < 500
    assert value == pytest.approx(reference, rel=1e-9)


def test_the_residual_bounds_the_error() -> None:
    model, batches = make_net(), make_batches()
    eigenvalues = torch.linalg.eigvalsh(explicit_hessian(make_net(), batches))
    for iterations in (1, 3, 6):
        value, converged, residual, done = top_hessian_eigenvalue(model, batches, iterations, 1e-12)
        assert not converged
        assert done == iterations
        assert (eigenvalues - value).abs().min() <= residual * abs(value)


def test_top_eigenvalue_of_a_quadratic() -> None:
    model, batches = quadratic([5.0, 2.0, 0.5], [0.1, 0.2, 0.3])
    result = top_hessian_eigenvalue(model, batches, 100, 1e-8, loss=half_square)
    assert result.value == pytest.approx(5.0, rel=1e-12)
    # The rest shrinks by 2 / 5 each time: (2 / 5) ** 20 is 1e-8.
    assert 15 < result.iterations < 26


def test_the_sign_of_the_largest_curvature_is_kept() -> None:
    model, batches = quadratic([5.0, 2.0], [0.1, 0.2])
    result = top_hessian_eigenvalue(model, batches, 100, 1e-6, loss=lambda x, y: -half_square(x, y))
    assert result.value == pytest.approx(-5.0, rel=1e-9)
    assert result.converged


def test_opposite_curvatures_never_converge() -> None:
    model = nn.Linear(2, 2, bias=False).double()
    data = [(torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    result = top_hessian_eigenvalue(model, data, 30, loss=lambda x, y: (signs * (x - y).square()).sum(1).mean())
    assert not result.converged
    assert result.residual > 0.1
    assert result.iterations == 30


@pytest.mark.parametrize("loss", [lambda x, y: (x * 0).sum(), lambda x, y: x.mean()])
def test_a_loss_without_curvature(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, batches = quadratic([1.0, 1.0], [0.1, 0.2])
    assert top_hessian_eigenvalue(model, batches, loss=loss) == (0.0, True, 0.0, 1)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    model, batches = make_net().float(), [(images.float(), labels) for images, labels in make_batches()]
    plain = top_hessian_eigenvalue(model, batches)
    scaled = top_hessian_eigenvalue(model, batches, loss=lambda x, y: scale * F.cross_entropy(x, y))
    assert scaled.value == pytest.approx(scale * plain.value, rel=1e-4)
    assert scaled.iterations == plain.iterations


def test_the_start_is_the_generators() -> None:
    model, batches = make_net(), make_batches()
    first, again = (top_hessian_eigenvalue(model, batches, 2, 1e-9) for _ in range(2))
    other = top_hessian_eigenvalue(model, batches, 2, 1e-9, generator=torch.Generator().manual_seed(9))
    assert first == again
    assert other.value != first.value


def test_attention_and_unused_parameters_are_differentiated_twice() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, activation="gelu")
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            tokens: Tensor = self.layer(x)
            return tokens[:, 0]

    torch.manual_seed(0)
    result = top_hessian_eigenvalue(Attends(), [(torch.rand(3, 2, 4), torch.tensor([0, 1, 2]))], 200, 1e-3)
    assert result.converged


def test_compiled_models_are_differentiated_twice() -> None:
    model, batches = make_net().eval(), make_batches()
    expected = top_hessian_eigenvalue(model, batches, iterations=3)
    model.compile(backend="aot_eager")
    model(batches[0][0])
    assert top_hessian_eigenvalue(model, batches, iterations=3) == expected


def test_measuring_inside_no_grad_works() -> None:
    model, batches = make_net(), make_batches()
    with torch.no_grad():
        assert top_hessian_eigenvalue(model, batches, 2) == top_hessian_eigenvalue(model, batches, 2)
        assert max_loss_in_ball(model, batches).sharpness > 0
    with torch.inference_mode():
        assert max_loss_in_ball(model, batches).sharpness > 0


def exact_maximum(curvatures: Tensor, weights: Tensor, rho: float) -> float:
    """Largest value of half of sum h w^2 in a ball: w + e with (mu - h) e = h w, mu by bisection until |e| = rho."""
    slope = curvatures * weights
    low, high = curvatures.max().item(), curvatures.max().item() + slope.norm().item() / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (slope / (mu - curvatures)).norm() > rho else (low, mu)
    return float(0.5 * (curvatures * (weights + slope / (mu - curvatures)).square()).sum())


def test_one_step_is_the_one_of_sam() -> None:
    curvatures, weights, rho = [4.0, 1.0], [1.0, 2.0], 0.3
    model, batches = quadratic(curvatures, weights)
    # The gradient (4, 2) has length sqrt(20).
    moved = [1 + rho * 4 / 20**0.5, 2 + rho * 2 / 20**0.5]
    result = max_loss_in_ball(model, batches, rho, loss=half_square)
    assert result.loss == pytest.approx(4.0)
    assert result.worst_loss == pytest.approx(0.5 * (4 * moved[0] ** 2 + moved[1] ** 2))
    assert result.sharpness == pytest.approx(result.worst_loss - result.loss)


def test_more_steps_approach_the_maximum_in_the_ball() -> None:
    curvatures, weights, rho = [4.0, 1.0, 0.2], [0.05, 1.0, 2.0], 0.5
    model, batches = quadratic(curvatures, weights)
    exact = exact_maximum(torch.tensor(curvatures), torch.tensor(weights), rho)
    found = [max_loss_in_ball(model, batches, rho, steps, loss=half_square).worst_loss for steps in (1, 2, 5, 60)]
    assert all(earlier < later for earlier, later in pairwise(found))
    assert found[0] < 0.99 * exact
    assert found[-1] == pytest.approx(exact, rel=1e-6)
    assert found[-1] <= exact * (1 + 1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_perturbation_of_a_network(adaptive: bool) -> None:
    model, batches, rho = make_net(), make_batches(), 0.7
    images, labels = joined(batches)
    twin = make_net().eval()
    weights = list(twin.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(twin(images), labels), weights)
    step = asam_perturbation(gradients, weights, rho) if adaptive else sam_perturbation(gradients, rho)
    before = snapshot(model)
    result = max_loss_in_ball(model, batches, rho, adaptive=adaptive)
    assert_untouched(model, before)
    assert result.loss == pytest.approx(F.cross_entropy(twin(images), labels).item(), rel=1e-12)
    with torch.no_grad():
        for parameter, part in zip(weights, step, strict=True):
            parameter.add_(part)
    assert result.worst_loss == pytest.approx(F.cross_entropy(twin(images), labels).item(), rel=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_search_stays_in_the_ball(adaptive: bool) -> None:
    model, rho = make_net(), 2.0
    origin = [p.detach().clone() for p in model.parameters()]
    scales = [w.abs() + 0.01 if adaptive and w.ndim > 1 else torch.ones_like(w) for w in origin]
    distances = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        moved = [(p - w) / s for p, w, s in zip(model.parameters(), origin, scales, strict=True)]
        distances.append(torch.cat([part.detach().flatten() for part in moved]).norm().item())
        return F.cross_entropy(logits, labels)

    max_loss_in_ball(model, make_batches(), rho, 6, adaptive, loss)
    # Two batches at each of seven places.
    assert len(distances) == 14
    assert distances[:2] == [0, 0]
    assert distances[2] == pytest.approx(rho)
    assert max(distances) <= rho * (1 + 1e-9)


def test_frozen_parameters_do_not_move() -> None:
    model = make_net()
    full = max_loss_in_ball(model, make_batches(), 0.5)
    model[5].requires_grad_(False)
    part = max_loss_in_ball(model, make_batches(), 0.5)
    assert 0 < part.sharpness < full.sharpness


def test_a_gradient_of_zero_finds_nothing() -> None:
    model, batches = quadratic([4.0, 1.0], [0.0, 0.0])
    assert max_loss_in_ball(model, batches, 0.5, 3, loss=half_square) == (0.0, 0.0, 0.0)


def test_a_step_that_goes_down_is_not_the_worst() -> None:
    """Past the ridge at 1 the loss falls: the one at the weights is the largest that was seen."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.9)
    ridge = [(torch.ones(1, 1), torch.zeros(1, 1))]
    loss, worst, sharpness = max_loss_in_ball(model, ridge, 5.0, loss=lambda x, y: -(x - 1).abs().sum())
    assert (worst, sharpness) == (loss, 0)


def test_overflow_is_an_infinite_loss() -> None:
    model, batches = make_net(), make_batches()
    for value in (float("inf"), float("nan")):
        losses = iter([1.0, 1.0, value, value])

        def loss(logits: Tensor, labels: Tensor, losses: Iterator[float] = losses) -> Tensor:
            return logits.mean() + next(losses)

        result = max_loss_in_ball(model, batches, steps=5, loss=loss)
        assert result.worst_loss == result.sharpness == float("inf")
        assert result.loss < 10


def test_a_gradient_that_is_not_finite_ends_the_search() -> None:
    """The square root has an infinite one at the minimum, where the loss is finite."""
    model, batches = nn.Linear(1, 1, bias=False), [(torch.ones(1, 1), torch.zeros(1, 1))]
    nn.init.constant_(model.weight, 1.0)
    result = max_loss_in_ball(model, batches, rho=1.0, steps=3, loss=lambda z, _: 2 - z.sub(2).abs().sqrt().sum())
    assert result == (1.0, 2.0, 1.0)
    assert model.weight.item() == 1


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_an_exception_leaves_no_trace(call: int) -> None:
    model = make_net()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        max_loss_in_ball(model, make_batches(), 0.5, 2, loss=FailsAt(call))
    assert_untouched(model, before)
    with pytest.raises(RuntimeError, match="out of memory"):
        top_hessian_eigenvalue(model, make_batches(), tolerance=1e-9, loss=FailsAt(call))
    assert_untouched(model, before)


def test_no_numbers_that_are_not_finite() -> None:
    model, batches = make_net(), make_batches()
    batches[0][0][0] = float("nan")
    with pytest.raises(ValueError, match="The second derivative of the loss is not finite"):
        top_hessian_eigenvalue(model, batches)
    with pytest.raises(ValueError, match="The loss at the weights is nan, and it or its gradient is not finite"):
        max_loss_in_ball(model, batches)


@pytest.mark.parametrize("measure", [top_hessian_eigenvalue, max_loss_in_ball])
def test_nothing_to_measure(measure: Callable[[nn.Module, Batches], object]) -> None:
    with pytest.raises(ValueError, match="`batches` to hold at least one image, but got none"):
        measure(make_net(), [])
    with pytest.raises(ValueError, match="`model` to have a parameter that requires a gradient, but it has none"):
        measure(make_net().requires_grad_(False), make_batches())


def test_arguments_are_checked() -> None:
    model, batches = make_net(), make_batches()
    with pytest.raises(ValueError, match="Expected argument `iterations` to be a positive integer, but got 0"):
        top_hessian_eigenvalue(model, batches, iterations=0)
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Expected argument `tolerance` to be a positive float, but got"):
            top_hessian_eigenvalue(model, batches, tolerance=tolerance)
    for rho in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Expected argument `rho` to be a positive float, but got"):
            max_loss_in_ball(model, batches, rho)
    with pytest.raises(ValueError, match="Expected argument `steps` to be a positive integer, but got 0"):
        max_loss_in_ball(model, batches, steps=0)
