"""Surrogates against a loop written out, and what is read off them against autograd."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_bd.backbones import small_cnn
from lightning_bd.functional.draws import keyed_generator, keyed_seed
from lightning_bd.selection import ForgettingEvents, GradientNorm, LossScore, SampleScorer, Selection, Surrogate


def tiny(num_classes: int, in_channels: int) -> nn.Module:
    return small_cnn(num_classes, in_channels, width=4)


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def digits(count: int = 120) -> tuple[Tensor, Tensor]:
    found = load_digits()
    images = torch.from_numpy(found.images[:count]).mul(15).to(torch.uint8)[:, None]
    return images, torch.from_numpy(found.target[:count]).to(torch.int64)


def by_hand(images: Tensor, labels: Tensor, epochs: int, batch_size: int) -> tuple[nn.Module, list[Tensor]]:
    """Train the linear model with the equations of SGD; return it and who was right in each epoch."""
    pixels = images.float() / 255
    pixels = (pixels - pixels.double().mean().float()) / pixels.double().std(correction=0).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(0, "surrogate"))
        model = linear(10, 1)
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    records = []
    for epoch in range(epochs):
        lr = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * epoch / epochs, dtype=torch.float64))).item() / 2
        right = torch.zeros(len(labels), dtype=torch.bool)
        order = torch.randperm(len(labels), generator=keyed_generator(0, "surrogate order", epoch))
        for rows in torch.split(order, batch_size):
            logits = model(pixels[rows])
            right[rows] = logits.argmax(1) == labels[rows]
            grads = torch.autograd.grad(nn.functional.cross_entropy(logits, labels[rows]), parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, grads, strict=True):
                    v.mul_(0.9).add_(g + 5e-4 * p)
                    p.sub_(lr * v)
        records.append(right)
    return model, records


def recipe(epochs: int = 6) -> Surrogate:
    return Surrogate(linear, epochs=epochs, lr=0.05, batch_size=40)


def test_losses_are_those_of_the_loop() -> None:
    images, labels = digits()
    model, _ = by_hand(images, labels, 6, 40)
    pixels = images.float() / 255
    pixels = (pixels - pixels.mean()) / pixels.std(correction=0)
    expected = -model(pixels).log_softmax(1)[torch.arange(120), labels]
    scores = LossScore(recipe()).score(images, labels, 0)
    assert torch.allclose(scores.float(), expected, atol=1e-4, rtol=1e-3)
    assert torch.allclose(LossScore(recipe()).score(images.float() / 255, labels, 0), scores, atol=1e-5)


def test_forgetting_events_are_those_of_the_loop() -> None:
    images, labels = digits()
    labels = labels[torch.randperm(120, generator=torch.Generator().manual_seed(0))]  # hard to learn, easy to forget
    _, records = by_hand(images, labels, 15, 40)
    expected = []
    for i in range(120):
        history = [bool(right[i]) for right in records]
        events = sum(before and not now for before, now in zip(history, history[1:], strict=False))  # noqa: RUF007
        expected.append(float(events if any(history) else 15))
    assert {0.0, 1.0, 2.0, 15.0} <= set(expected)
    assert ForgettingEvents(recipe(15)).score(images, labels, 0).tolist() == expected


def test_gradient_norms_equal_autograd() -> None:
    images, labels = digits(60)
    surrogate = Surrogate(tiny, epochs=2, lr=0.05, batch_size=16)
    scores = GradientNorm(surrogate).score(images, labels, 0)
    network = surrogate.train(images, labels)
    head = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    for i in range(60):
        loss = nn.functional.cross_entropy(network(images[i : i + 1].float() / 255), labels[i : i + 1])
        [gradient] = torch.autograd.grad(loss, [head.weight])
        assert abs(float(gradient.norm()) - float(scores[i])) < 1e-4 * max(1.0, float(scores[i]))


@pytest.mark.parametrize("kind", [LossScore, GradientNorm, ForgettingEvents])
def test_a_wrong_label_is_hard(kind: type[LossScore | GradientNorm | ForgettingEvents]) -> None:
    """The mislabelled digits score at least twice as high as the others."""
    images, labels = digits(400)
    wrong = torch.arange(0, 400, 40)
    labels[wrong] = (labels[wrong] + 5) % 10
    scores = kind(Surrogate(tiny, epochs=20, lr=0.05, batch_size=64)).score(images, labels, 0)
    mislabelled = torch.zeros(400, dtype=torch.bool).index_fill_(0, wrong, True)
    assert scores[mislabelled].mean() > 2 * scores[~mislabelled].mean()


@pytest.mark.parametrize("scorer", [LossScore, GradientNorm, ForgettingEvents])
def test_training_is_repeatable_and_leaves_no_trace(scorer: type[LossScore | GradientNorm | ForgettingEvents]) -> None:
    images, labels = digits(60)
    state = torch.get_rng_state()
    surrogate = Surrogate(tiny, epochs=2, batch_size=59)  # a last batch of one image
    with torch.inference_mode():
        first = scorer(surrogate).score(images, labels, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    with torch.no_grad():
        second = scorer(Surrogate(tiny, epochs=2, batch_size=59)).score(images, labels, 0)
    torch.set_rng_state(state)
    assert torch.equal(first, second)
    other = LossScore(Surrogate(tiny, epochs=2, seed=1)).score(images, labels, 0)
    assert not torch.equal(other, LossScore(Surrogate(tiny, epochs=2)).score(images, labels, 0))


def test_a_selection_gives_all_classes_and_takes_one() -> None:
    images, labels = digits(120)
    scorer: SampleScorer = LossScore(recipe(2))
    assert scorer.needs_other_classes
    selection = Selection(scorer)
    rows = selection.choose(images, labels, 3, 4, candidates=labels == 4)
    assert (labels[rows] == 4).all()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    again = selection.choose(images[order], labels[order], 3, 4, candidates=labels[order] == 4)
    assert sorted(order[again].tolist()) == rows.tolist()


def test_a_channel_of_one_value_is_no_division_by_zero() -> None:
    images, labels = torch.full((8, 1, 8, 8), 7, dtype=torch.uint8), torch.arange(8) % 2
    assert LossScore(recipe(1)).score(images, labels, 0).isfinite().all()


def test_identity_holds_the_recipe_but_not_the_device() -> None:
    assert LossScore(recipe(1)).identity() != LossScore(recipe(2)).identity()
    assert LossScore(Surrogate(tiny)).identity() != LossScore(Surrogate(linear)).identity()
    assert LossScore(Surrogate(device="meta")).identity() == LossScore().identity()


def test_further_arguments_of_the_backbone() -> None:
    images, labels = digits(20)
    narrow, wide = (
        Surrogate(small_cnn, epochs=1, backbone_arguments={"width": width}).train(images, labels) for width in (2, 4)
    )
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (narrow, wide)]
    expected = [sum(p.numel() for p in small_cnn(10, 1, width=width).parameters()) for width in (2, 4)]
    assert sizes == expected
    one, other = (LossScore(Surrogate(small_cnn, backbone_arguments={"width": width})) for width in (2, 4))
    assert one.identity() != other.identity()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "`epochs` to be an integer of at least 1, but got 0"),
        ("batch_size", 1, "`batch_size` to be an integer of at least 2, but got 1"),
        ("lr", 0.0, "`lr` to be a positive float, but got 0.0"),
        ("lr", float("nan"), "`lr` to be a positive float, but got nan"),
        ("momentum", 1.0, r"`momentum` to be a float in \[0, 1\), but got 1.0"),
        ("weight_decay", -1.0, "`weight_decay` to be a non-negative float, but got -1.0"),
    ],
)
def test_refuses_arguments(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Surrogate(**{name: value})  # type: ignore[arg-type]


def test_refuses_what_cannot_be_learned() -> None:
    images, labels = digits(20)
    with pytest.raises(ValueError, match="at least 2 images to train a surrogate on, but got 1"):
        recipe().train(images[:1], labels[:1])
    with pytest.raises(ValueError, match=r"loss is not finite after epoch \d+. Lower its `lr` \(1e\+30\)"):
        Surrogate(linear, lr=1e30).train(images, labels)
    with pytest.raises(ValueError, match="`surrogate` to train for at least 2 epochs, but got 1"):
        ForgettingEvents(recipe(1))


def test_a_last_batch_of_one_image_is_left_out() -> None:
    """Batch normalisation after pooling has no statistics of a single image."""
    images, labels = digits(33)
    sizes: list[int] = []
    Surrogate(tiny, epochs=2, batch_size=16).train(images, labels, lambda rows, _: sizes.append(len(rows)))
    assert sizes == [16, 16, 16, 16]
