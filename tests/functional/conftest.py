"""A network and batches to measure losses with, and what both must be after it."""

import copy
from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Batches = list[tuple[Tensor, Tensor]]


class Exploding(Batches):
    """Batches of which the second raises."""

    def __init__(self, first: tuple[Tensor, Tensor]) -> None:
        super().__init__([first])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self[0]
        raise RuntimeError("no more")


class Toys:
    """Makes what a test of a measurement needs."""

    def net(self, seed: int = 0) -> nn.Sequential:
        """Weights and running statistics of their own; one layer in a mode of its own."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
            )
            for parameter in net[1].parameters():
                nn.init.normal_(parameter, 1.0)
            for _ in range(seed + 1):
                net(torch.rand(8, 1, 6, 6))
        net[2].eval()
        return net

    def batches(self, sizes: tuple[int, ...] = (8, 3), seed: int = 0) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.rand(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
            for size in sizes
        ]

    def exploding(self) -> Exploding:
        return Exploding(self.batches()[0])

    def snapshot(self, model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return state, [module.training for module in model.modules()]

    def assert_untouched(self, model: nn.Module, before: tuple[dict[str, Tensor], list[bool]]) -> None:
        state, modes = self.snapshot(model)
        assert modes == before[1]
        assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def expected(self, model: nn.Module, weights: Mapping[str, Tensor], batches: Batches) -> tuple[float, float]:
        """Loss and accuracy of a copy with these weights, all images at once."""
        model = copy.deepcopy(model).eval()
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        logits = functional_call(model, dict(weights), (images,)).detach()
        return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


@pytest.fixture(scope="session")
def toys() -> Toys:
    return Toys()
