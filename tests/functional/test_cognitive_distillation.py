"""Masks against one image at a time, with Adam and the total variation written out; closed forms; no trace."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_bd import backbones
from lightning_bd.functional.cognitive_distillation import distill, total_variation
from lightning_bd.functional.draws import keyed_generator


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = backbones.small_cnn(4, in_channels=2, width=4).eval()
        nn.init.normal_(model.get_parameter("fc.weight"))
    return model


def step_edge(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., width // 2 :] = 1
    return mask


def checkerboard(height: int, width: int) -> Tensor:
    return ((torch.arange(height)[:, None] + torch.arange(width)) % 2).float()[None, None]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 6)])
def test_total_variation_has_its_closed_forms(height: int, width: int) -> None:
    pairs = height * (width - 1) + (height - 1) * width
    assert total_variation(torch.full((1, 1, height, width), 0.3)).item() == 0
    assert total_variation(checkerboard(height, width)).item() == pytest.approx(pairs / (height * width))
    assert total_variation(step_edge(height, width)).item() == pytest.approx(1 / width)
    assert total_variation(step_edge(width, height).mT).item() == pytest.approx(1 / height if height > 1 else 0)


def test_total_variation_is_each_masks_own_mean_over_channels() -> None:
    masks = torch.cat([step_edge(4, 4), checkerboard(4, 4)], dim=1)
    both = torch.stack([masks[0], 2 * masks[0]])
    assert torch.allclose(total_variation(both), torch.tensor([(4 + 24) / 32, 4 * (4 + 24) / 32]))


def test_masks_start_at_the_papers_value() -> None:
    masks = distill(lambda images: images.flatten(1), draw(2, 3, 4, 4), alpha=0.01, steps=0)
    assert masks.shape == (2, 1, 4, 4)
    assert torch.allclose(masks, torch.tensor(0.8808), atol=5e-5)


def variation(mask: Tensor) -> Tensor:
    """Neighbour by neighbour."""
    channels, height, width = mask.shape
    total = torch.zeros((), dtype=mask.dtype)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                if i + 1 < height:
                    total = total + (mask[c, i + 1, j] - mask[c, i, j]) ** 2
                if j + 1 < width:
                    total = total + (mask[c, i, j + 1] - mask[c, i, j]) ** 2
    return total / (channels * height * width)


def one_mask(
    model: nn.Module, image: Tensor, channels: int, alpha: float, beta: float, steps: int, lr: float
) -> Tensor:
    """The method for one image, Adam written out."""
    theta = torch.ones(channels, *image.shape[1:], dtype=image.dtype)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    with torch.no_grad():
        clean = model(image[None])[0]
    for step in range(steps):
        color = torch.rand(len(image), generator=keyed_generator(3, "distill", step)).to(image.dtype)[:, None, None]
        theta.requires_grad_()
        mask = torch.sigmoid(2 * theta)
        changed = model((image * mask + (1 - mask) * color)[None])[0]
        loss = (clean - changed).abs().sum() / len(clean) + alpha * mask.abs().sum() + beta * variation(mask)
        (gradient,) = torch.autograd.grad(loss, theta)
        first = 0.1 * first + 0.9 * gradient
        second = 0.1 * second + 0.9 * gradient**2
        corrected = first / (1 - 0.1 ** (step + 1)), second / (1 - 0.1 ** (step + 1))
        theta = theta.detach() - lr * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return torch.sigmoid(2 * theta)


@pytest.mark.parametrize(("channels", "beta"), [(1, 1.0), (2, 10.0)])
def test_masks_are_those_of_one_image_at_a_time(model: nn.Module, channels: int, beta: float) -> None:
    model = model.double()
    images = draw(3, 2, 5, 4, dtype=torch.float64)
    found = distill(model, images, alpha=0.02, beta=beta, steps=6, lr=0.2, mask_channels=channels, seed=3)
    assert found.dtype == torch.float64
    for image, mask in zip(images, found, strict=True):
        expected = one_mask(model, image, channels, alpha=0.02, beta=beta, steps=6, lr=0.2)
        assert torch.allclose(mask, expected, rtol=0, atol=1e-9)


def test_an_images_mask_does_not_depend_on_its_batch(model: nn.Module) -> None:
    images = draw(4, 2, 8, 8)
    together = distill(model, images, alpha=0.01)
    assert together.std() > 0.1
    alone = torch.cat([distill(model, image[None], alpha=0.01) for image in images])
    turned = distill(model, images.flip(0), alpha=0.01).flip(0)
    for other in (alone, turned):
        assert torch.allclose(together, other, rtol=0, atol=1e-6)


def _fail(gradient: Tensor) -> None:
    pytest.fail("a weight's gradient was computed")


def test_no_weight_gets_a_gradient(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(_fail)  # type: ignore[no-untyped-call]
    random = torch.get_rng_state()
    images = draw(2, 2, 6, 6)
    kept = images.clone()
    masks = distill(model, images, alpha=0.01, steps=2)
    assert not masks.requires_grad
    assert torch.equal(images, kept)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_clean_output_is_computed_once_and_colors_change_with_step_and_seed() -> None:
    def passes(steps: int, seed: int) -> list[Tensor]:
        seen: list[Tensor] = []

        def note(images: Tensor) -> Tensor:
            seen.append(images.detach())
            return images.flatten(1)

        distill(note, torch.zeros(2, 3, 4, 4), alpha=0.0, beta=0.0, steps=steps, seed=seed)
        return seen

    first, longer, other = passes(1, 0), passes(3, 0), passes(1, 1)
    assert len(first) == 2
    assert len(longer) == 4
    assert torch.equal(longer[1], first[1])
    assert not torch.equal(other[1], first[1])
    # 12 % of the colour shows, one of each channel, the same in all images.
    colors = first[1] / (1 - (math.tanh(1) + 1) / 2)
    assert torch.allclose(colors, colors[:1, :, :1, :1].expand_as(colors), atol=1e-6)
    assert len(set(colors[0, :, 0, 0].tolist())) == 3
    assert all(0 <= color <= 1 for color in colors[0, :, 0, 0].tolist())
    assert not torch.allclose(longer[2][0, :, 0, 0], longer[1][0, :, 0, 0])


def test_half_precision_is_the_models_alone() -> None:
    seen = set()

    def note(images: Tensor) -> Tensor:
        seen.add(images.dtype)
        return images.flatten(1)

    masks = distill(note, draw(2, 1, 4, 4).bfloat16(), alpha=0.01, steps=2)
    assert seen == {torch.bfloat16}
    assert masks.dtype == torch.float32


def test_number_of_mask_channels_is_checked() -> None:
    with pytest.raises(ValueError, match="`mask_channels` to be 1 or 3, but got 2"):
        distill(lambda images: images.flatten(1), draw(1, 3, 4, 4), alpha=0.01, mask_channels=2)
