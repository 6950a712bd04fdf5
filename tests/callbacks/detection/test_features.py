"""The tap reads what the last linear layer gets and gives, whatever the model is called."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bd.backbones import preact_resnet18, resnet18, small_cnn
from lightning_bd.callbacks.detection.features import FeatureTap, pooled


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


class TwoHeads(nn.Module):
    """The auxiliary head runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = nn.Linear(4, 3), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        self.auxiliary(x)
        logits: Tensor = self.main(x)
        return logits


def test_features_are_the_input_of_the_last_linear_layer() -> None:
    model, images = mlp(), torch.rand(5, 3, 2, 2)
    tap = FeatureTap(model)
    tap.open()
    logits = model(images)
    seen = tap.take(5)
    torch.testing.assert_close(seen.features, model[:3](images), rtol=0, atol=0)
    assert torch.equal(seen.logits, logits)
    assert not seen.features.requires_grad
    assert tap.head is not None
    torch.testing.assert_close(seen.features @ tap.head.weight.T + tap.head.bias, logits)
    tap.close()


def test_the_layer_that_runs_last_counts_not_the_one_that_is_written_last() -> None:
    model, x = TwoHeads(), torch.rand(2, 4)
    tap = FeatureTap(model)
    tap.open()
    model(x)
    assert torch.equal(tap.take(2).logits, model.main(x))


@pytest.mark.parametrize("make", [resnet18, preact_resnet18])
def test_backbones(make: object) -> None:
    model = make(num_classes=4, width=4).eval()  # type: ignore[operator]
    tap = FeatureTap(model)
    tap.open()
    logits = model(torch.rand(3, 3, 32, 32))
    assert tap.take(3).features.shape == (3, 32)
    assert torch.equal(tap.take(3).logits, logits)


def test_every_pass_is_read_anew_and_nothing_stays_on_the_model() -> None:
    model = mlp()
    before = [len(module._forward_hooks) for module in model.modules()]
    tap = FeatureTap(model)
    tap.open()
    tap.open()
    for count in (5, 2, 7):
        tap.skip()
        logits = model(torch.rand(count, 3, 2, 2))
        assert torch.equal(tap.take(count).logits, logits)
        # Only the head is listened to from the first pass on, and the whole model.
        assert sum(len(module._forward_hooks) for module in model.modules()) == 2
    tap.close()
    tap.close()
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_skipping_forgets() -> None:
    model = mlp()
    tap = FeatureTap(model)
    tap.open()
    model(torch.rand(2, 3, 2, 2))
    tap.take(2)
    tap.skip()
    with pytest.raises(MisconfigurationException, match="did not run in this step"):
        tap.take(2)


def test_a_named_layer_is_averaged_over_space() -> None:
    model = small_cnn(num_classes=4, in_channels=1, width=4)
    name, convolution = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    seen: list[Tensor] = []
    convolution.register_forward_hook(lambda _m, _i, output: seen.append(output))
    tap = FeatureTap(model, name)
    tap.open()
    logits = model(torch.rand(3, 1, 8, 8))
    torch.testing.assert_close(tap.take(3).features, seen[0].mean(dim=(2, 3)))
    assert torch.equal(tap.take(3).logits, logits)
    assert tap.head is None  # it does not make logits of these features


def test_a_model_without_a_linear_layer_says_how_to_name_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tap = FeatureTap(model)
    tap.open()
    model(torch.rand(2, 3, 4, 4))
    with pytest.raises(MisconfigurationException, match=r"ran no linear layer.*`layer=...`, such as one of 0, 1, 2"):
        tap.take(2)
    named = FeatureTap(model, "0")
    named.open()
    logits = model(torch.rand(2, 3, 4, 4))
    assert named.take(2).features.shape == (2, 4)
    assert torch.equal(named.take(2).logits, logits)


def test_an_unknown_layer_is_refused_with_a_guess() -> None:
    with pytest.raises(MisconfigurationException, match=r"`ResNet` has no layer `layer9`\. Did you mean `layer"):
        FeatureTap(resnet18(num_classes=2, width=4), "layer9")


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = TwoHeads()
    model.unused = nn.Linear(1, 1)
    tap = FeatureTap(model, "unused")
    tap.open()
    model(torch.rand(2, 4))
    with pytest.raises(MisconfigurationException, match="The layer `unused` did not run"):
        tap.take(2)


def test_a_step_that_passes_part_of_the_batch_is_refused() -> None:
    model = mlp()
    tap = FeatureTap(model)
    tap.open()
    model(torch.rand(2, 3, 2, 2))
    with pytest.raises(MisconfigurationException, match="2 rows of features and 2 of logits for a batch of 4 images"):
        tap.take(4)


def test_features_in_half_precision_come_as_float32() -> None:
    model = mlp().to(torch.bfloat16)
    tap = FeatureTap(model)
    tap.open()
    model(torch.rand(2, 3, 2, 2, dtype=torch.bfloat16))
    assert tap.take(2).features.dtype is torch.float32
    assert tap.take(2).logits.dtype is torch.float32


def test_pooling() -> None:
    maps, tokens = torch.rand(2, 3, 4, 5), torch.rand(2, 6, 3)
    torch.testing.assert_close(pooled(maps), maps.flatten(2).mean(2))
    torch.testing.assert_close(pooled(tokens), tokens.sum(1) / 6)
    with pytest.raises(ValueError, match=r"\(B, D\), \(B, C, H, W\) or \(B, N, D\), but got \(3,\)"):
        pooled(torch.rand(3))


def test_several_passes_are_refused() -> None:
    model, x = mlp(), torch.rand(2, 3, 2, 2)
    tap = FeatureTap(model)
    for _ in range(2):  # in the first pass, and when the head is known
        tap.open()
        tap.skip()
        model(x)
        model(torch.zeros_like(x))
        with pytest.raises(MisconfigurationException, match="ran several times in this step"):
            tap.take(2)
        tap.skip()
        model(x)
        tap.take(2)


class Gated(nn.Module):
    """Its only linear layer is a gate; the classifier is a convolution."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.gate, self.classifier = nn.Linear(6, 6), nn.Conv2d(6, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x.mean(dim=(2, 3))).sigmoid()
        logits: Tensor = self.classifier(x * gates[:, :, None, None]).mean(dim=(2, 3))
        return logits


@pytest.mark.parametrize("classes", [3, 6])
def test_a_linear_layer_that_makes_no_logits_is_refused(classes: int) -> None:
    model, x = Gated(classes), torch.rand(4, 6, 3, 3)
    tap = FeatureTap(model)
    tap.open()
    model(x)
    with pytest.raises(MisconfigurationException, match=r"does not make its output.*Name the layer"):
        tap.take(4)
    named = FeatureTap(model, "classifier")
    named.open()
    logits = model(x)
    assert torch.equal(named.take(4).logits, logits)


class Scaled(nn.Module):
    """Does something to its logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.head = kind, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return {"log_softmax": logits.log_softmax(1), "softmax": logits.softmax(1), "times": logits * 20}[self.kind]


@pytest.mark.parametrize("kind", ["log_softmax", "softmax", "times"])
def test_logits_are_those_before_a_softmax(kind: str) -> None:
    model, x = Scaled(kind), torch.rand(4, 4)
    tap = FeatureTap(model)
    tap.open()
    model(x)
    assert torch.equal(tap.take(4).logits, model.head(x))


def test_graphs_are_kept_on_request() -> None:
    model, x = mlp(), torch.rand(2, 3, 2, 2, requires_grad=True)
    tap = FeatureTap(model, detach=False)
    tap.open()
    model(x)
    (gradient,) = torch.autograd.grad(tap.take(2).features.sum(), x)
    assert bool(gradient.any())
