"""The Fisher diagonal against its definition, one sample at a time, for each kind of label, layer and path."""

import logging
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bd.backbones import resnet18, resnet20, vgg11_bn
from lightning_bd.functional.fisher import FisherKind, fisher_diagonal, fisher_sums
from lightning_bd.functional.layer_squares import _add_one_by_one, _add_unfolded
from lightning_bd.functional.per_sample import SquaredGradients

Batches = list[tuple[Tensor, Tensor]]
KINDS: tuple[FisherKind, ...] = get_args(FisherKind)


def definition(model: nn.Module, batches: Batches, kind: FisherKind = "empirical") -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    samples = [(x, int(y)) for images, labels in batches for x, y in zip(images, labels, strict=True)]
    for x, y in samples:
        log_p = model(x[None].clone()).log_softmax(1)[0]
        p = log_p.detach().exp()
        weights = {"empirical": {y: 1.0}, "weighted": {y: p[y]}, "exact": dict(enumerate(p))}[kind]
        for label, weight in weights.items():
            gradients = torch.autograd.grad(
                log_p[label], list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += weight * gradient.square()
    return {name: total / len(samples) for name, total in sums.items()}


def randomised(model: nn.Module) -> nn.Module:
    """Parameters and running statistics away from their initial values; float64, for a sharp comparison."""
    model.double().eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for p in model.parameters():
            p.normal_(0.1, 0.4)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.3, 2.0)
    return model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        out += x
        return F.relu_(out)


def cnn(inplace: bool = True) -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Hardtanh(-1.0, 1.0, inplace=inplace),  # works on the batch itself
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=inplace),
            Residual(),
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
            nn.GroupNorm(3, 6),
            nn.Conv2d(6, 4, 2, stride=3),
            nn.Flatten(),
            nn.Linear(16, 5),
            nn.BatchNorm1d(5),
            nn.Tanh(),
            nn.Linear(5, 3),
        )
    )


class Sequence(nn.Module):
    """Linear layers and layer norms with dimensions between batch and features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.plane_norm = nn.LayerNorm((5, 4))
        self.hidden = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plane_norm(self.norm(self.embed(x)).tanh())
        logits: Tensor = self.head(self.hidden(x).tanh().mean((1, 2)))
        return logits


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.layer(x).tanh())
        return logits


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(x).tanh())
        return logits


class Functional(nn.Module):
    """Uses a layer's weight behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x).tanh(), self.layer.weight.t())


class Foreign(nn.Module):
    """A layer without a rule, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.layer, self.activation = nn.Linear(3, 3), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.activation(x)) * self.scale
        return logits


class Branching(nn.Module):
    """Uses its layer a number of times that depends on the data, which vmap cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if bool((x > 0).all()) else self.layer(out.tanh())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(x).mean(1))
        return logits


class SequenceFirst(nn.Module):
    """Hands its layer the samples in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x.expand(2, *x.shape).cumsum(0)).tanh().sum(0))
        return logits


def batches_for(model: nn.Module) -> Batches:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 9, 9) if isinstance(model, nn.Sequential) else (2, 5, 3) if isinstance(model, Sequence) else (3,)

    def images(size: int) -> Tensor:
        if isinstance(model, Tokens):
            return torch.randint(5, (size, 4), generator=generator)
        return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

    return [(images(size), torch.randint(3, (size,), generator=generator)) for size in (4, 2, 1)]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("kind", ["empirical", "exact", "weighted"])
@pytest.mark.parametrize("build", [cnn, Sequence])
def test_kinds_match_definition(
    build: Callable[[], nn.Module], kind: FisherKind, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomised(build())
    batches = batches_for(model)
    with caplog.at_level(logging.INFO, "lightning_bd"):
        actual = fisher_diagonal(model, batches, kind)
    assert_same(actual, definition(model, batches, kind))
    assert not caplog.records  # the layers' own rules served


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (UsedTwice, "vmap"),
        (Tied, "vmap"),
        (Functional, "vmap"),
        (Foreign, "vmap"),
        (Tokens, "vmap"),
        (SequenceFirst, "vmap"),
    ],
)
@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_other_models_fall_back_and_say_so(
    build: Callable[[], nn.Module], method: str, kind: FisherKind, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomised(build())
    batches = batches_for(model)
    with caplog.at_level(logging.INFO, "lightning_bd"):
        actual = fisher_diagonal(model, batches, kind)
    assert_same(actual, definition(model, batches, kind))
    assert [method in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")],
        [nn.Conv2d(2, 3, 4, padding="same")],
        [nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))],
    ],
    ids=["circular", "same", "weight norm"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:There is a performance drop")
def test_variants_of_layers_fall_back(layers: list[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model = randomised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)))
    batches = batches_for(model)
    with caplog.at_level(logging.INFO, "lightning_bd"):
        actual = fisher_diagonal(model, batches)
    assert_same(actual, definition(model, batches))
    assert len(caplog.records) == 1


def test_control_flow_in_a_later_batch_goes_through_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    model = randomised(Branching())
    (first, first_labels), (second, second_labels), _ = batches_for(model)
    batches = [(first.abs(), first_labels), (-second.abs(), second_labels)]
    with caplog.at_level(logging.INFO, "lightning_bd"):
        actual = fisher_diagonal(model, batches)
    assert_same(actual, definition(model, batches))
    assert len(caplog.records) == 2
    assert "called more than once" in caplog.records[0].message
    assert "loop" in caplog.records[1].message


def test_unused_layer_has_zero_information(caplog: pytest.LogCaptureFixture) -> None:
    class Unused(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    model = randomised(Unused())
    batches = [(x.abs(), y) for x, y in batches_for(model)]
    with caplog.at_level(logging.INFO, "lightning_bd"):
        diagonal = fisher_diagonal(model, batches)
    assert diagonal.pop("unused.weight").abs().max() == 0
    assert diagonal.pop("unused.bias").abs().max() == 0
    expected = definition(model, batches)
    assert_same(diagonal, {name: expected[name] for name in diagonal})
    assert not caplog.records


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_both_convolution_rules_agree_with_autograd(groups: int) -> None:
    layer = nn.Conv2d(4, 8, (3, 2), (2, 1), (1, 2), (1, 2), groups, bias=False).double()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    out = layer(x)
    gradient = torch.randn_like(out)
    expected = torch.stack(
        [torch.autograd.grad(layer(a[None]), layer.weight, g[None])[0] for a, g in zip(x, gradient, strict=True)]
    )
    for memory in (1, 10**4, 10**9):
        total = torch.zeros_like(layer.weight)
        with torch.no_grad():
            _add_unfolded(layer, x, gradient, total, memory)
        torch.testing.assert_close(total, expected.square().sum(0))
    total = torch.zeros_like(layer.weight)
    with torch.no_grad():
        _add_one_by_one(layer, x, gradient, total)
    torch.testing.assert_close(total, expected.square().sum(0))


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("backbone", [resnet18, resnet20, vgg11_bn])
def test_memory_format_does_not_change_the_result(backbone: Callable[..., nn.Module], size: int) -> None:
    torch.manual_seed(0)
    model = backbone(num_classes=3, width=4).eval()
    images, labels = torch.rand(4, 3, size, size), torch.tensor([0, 1, 2, 0])
    contiguous = fisher_diagonal(model, [(images, labels)])
    model.to(memory_format=torch.channels_last)
    channels_last = fisher_diagonal(model, [(images.contiguous(memory_format=torch.channels_last), labels)])
    for name, expected in contiguous.items():
        torch.testing.assert_close(channels_last[name], expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


def test_logistic_regression_has_closed_form() -> None:
    # p(1|x) = s(w x): F = mean x^2 s (1 - s) exactly, mean x^2 (y - s)^2 for the data's labels. Two logits +-w/2 x.
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    y = torch.tensor([0, 1, 0])
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.35], [0.35]]))
    s = torch.sigmoid(0.7 * x)
    exact = (x**2 * s * (1 - s)).mean()
    empirical = (x**2 * (y - s) ** 2).mean()
    batches = [(x[:, None], y)]
    torch.testing.assert_close(fisher_diagonal(model, batches, "exact")["weight"], exact.expand(2, 1))
    torch.testing.assert_close(fisher_diagonal(model, batches, "empirical")["weight"], empirical.expand(2, 1))


def test_is_not_the_square_of_the_mean_gradient() -> None:
    # Two samples with opposite gradients: the mean vanishes, the mean of squares is 1/4.
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    diagonal = fisher_diagonal(model, [(torch.ones(2, 1), torch.tensor([0, 1]))])
    assert diagonal["weight"].tolist() == [[0.25], [0.25]]


def test_sampled_labels_come_from_the_model_and_the_generator() -> None:
    # With logits b the gradient for label y is onehot(y) - p, so F tells the drawn frequencies:
    # F_c = f_c (1 - p_c)^2 + (1 - f_c) p_c^2, hence f_c = (F_c - p_c^2) / (1 - 2 p_c).
    model = nn.Linear(1, 3).double()
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(p.log())
    batches = [(torch.zeros(20_000, 1, dtype=torch.float64), torch.zeros(20_000, dtype=torch.long))]

    def frequencies(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        diagonal = fisher_diagonal(model, batches, "sampled", generator=generator, chunk_size=5000)["bias"]
        return (diagonal - p**2) / (1 - 2 * p)

    first = frequencies(0)
    assert (first - p).abs().max() < 4 * (0.25 / 20_000) ** 0.5
    assert torch.equal(first, frequencies(0))
    assert not torch.equal(first, frequencies(1))
    assert torch.equal(frequencies(None), frequencies(None))


def test_chunks_and_memory_do_not_change_the_result() -> None:
    model = cnn()
    batches = batches_for(model)
    expected = fisher_diagonal(model, batches, "exact")
    merged = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    for chunk_size, max_memory in ((1, None), (3, None), (None, 1), (2, 2000), (100, 10**9)):
        assert_same(fisher_diagonal(model, merged, "exact", chunk_size=chunk_size, max_memory=max_memory), expected)


def test_draws_do_not_depend_on_chunks() -> None:
    model = cnn()
    batches = batches_for(model)
    assert_same(fisher_diagonal(model, batches, "sampled", chunk_size=1), fisher_diagonal(model, batches, "sampled"))


def test_num_samples_stops_early_and_reads_no_further() -> None:
    model = randomised(Sequence())
    batches = batches_for(model)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        yield batches[0]
        yield batches[0]
        raise AssertionError("a third batch was read")

    images, labels = batches[0]
    expected = definition(model, [batches[0], (images[:2], labels[:2])])
    assert_same(fisher_diagonal(model, endless(), num_samples=6), expected)
    assert_same(fisher_diagonal(model, endless(), num_samples=8), fisher_diagonal(model, [batches[0]]))
    sums, count = fisher_sums(model, endless(), num_samples=0)
    assert count == 0
    assert all(total.abs().max() == 0 for total in sums.values())


def test_only_trainable_parameters_are_measured() -> None:
    model = cnn()
    frozen = dict(model.named_parameters())["5.weight"]
    frozen.requires_grad_(False)
    batches = batches_for(model)
    diagonal = fisher_diagonal(model, batches)
    assert "5.weight" not in diagonal
    assert_same(diagonal, definition(model, batches))


def test_half_precision_is_summed_in_single() -> None:
    model = randomised(Sequence()).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in batches_for(model)]
    diagonal = fisher_diagonal(model, batches)
    expected = definition(model.double(), [(x.double(), y) for x, y in batches])
    for name, value in expected.items():
        assert diagonal[name].dtype == torch.float32
        assert (diagonal[name] - value).norm() < 0.1 * value.norm()


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 3:
            raise OSError("broken")
        logits: Tensor = self.net(x)
        return logits


class Counting(nn.Module):
    """Changes a buffer and draws random numbers in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1 + torch.rand(())
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("build", [cnn, Failing, Counting])
def test_leaves_no_trace(build: Callable[[], nn.Module]) -> None:
    model = build().train()
    modes = dict.fromkeys(model.modules(), True)
    for index, module in enumerate(model.modules()):
        module.training = modes[module] = index % 2 == 0
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    flags, gradients = [p.requires_grad for p in parameters], [p.grad for p in parameters]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    batches = batches_for(cnn())
    random_state = torch.get_rng_state()
    before = [x.clone() for x, _ in batches]
    if isinstance(model, Failing):
        with pytest.raises(OSError, match="broken"):
            fisher_diagonal(model, batches, "sampled")
    else:
        fisher_diagonal(model, batches, "sampled")
    assert all(module.training == training for module, training in modes.items())
    assert [p.requires_grad for p in parameters] == flags
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    assert parameters[1].grad is not None
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert all(not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(x, y) for (x, _), y in zip(batches, before, strict=True))
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


def test_works_without_gradients_enabled_and_under_autocast() -> None:
    model = randomised(Sequence())
    batches = batches_for(model)
    expected = fisher_diagonal(model, batches)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(fisher_diagonal(model, batches), expected)


def test_compiled_model() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(147, 3)))
    batches = batches_for(model)
    expected = definition(model, batches)
    model.compile(backend="eager")
    model(batches[0][0])
    assert_same(fisher_diagonal(model, batches), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_matches_cpu(kind: FisherKind) -> None:
    model = cnn()
    batches = batches_for(model)
    expected = fisher_diagonal(model, batches, kind)
    actual = fisher_diagonal(model.cuda(), [(x.cuda(), y.cuda()) for x, y in batches], kind)
    assert_same({name: value.cpu() for name, value in actual.items()}, expected)


def test_arguments_are_checked() -> None:
    model = nn.Linear(1, 2)
    batch = (torch.ones(2, 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"Expected argument `kind` to be one of \('empirical'.* but got 'true'"):
        fisher_diagonal(model, [batch], "true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected argument `num_samples` to be a non-negative integer .* -1"):
        fisher_diagonal(model, [batch], num_samples=-1)
    with pytest.raises(ValueError, match=r"Expected argument `chunk_size` to be a positive integer .* got 0"):
        fisher_diagonal(model, [batch], chunk_size=0)
    with pytest.raises(ValueError, match=r"Expected argument `max_memory` to be a positive integer .* got 0"):
        SquaredGradients(model, max_memory=0)
    with pytest.raises(ValueError, match="Expected argument `batches` to hold at least one sample"):
        fisher_diagonal(model, [])
    with pytest.raises(ValueError, match=r"Expected labels of shape \(2,\), one for each image, but got \(1,\)"):
        fisher_diagonal(model, [(torch.ones(2, 1), torch.tensor([0]))])
    mixing = nn.BatchNorm1d(2, track_running_stats=False)
    with pytest.raises(ValueError, match=r"treat each sample for itself, but got one whose layer '1' has no running"):
        fisher_diagonal(nn.Sequential(model, mixing), [batch])
    with pytest.raises(ValueError, match=r"return logits of shape \(B, C\), but got \(2, 1, 2\)"):
        fisher_diagonal(model, [(torch.ones(2, 1, 1), torch.tensor([0, 1]))])
