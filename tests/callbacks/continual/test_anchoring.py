"""Anchoring through a Trainer against loops written by hand; the module knows nothing of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.batch import Sample
from lightning_bd.callbacks.continual.anchoring import Anchoring

if TYPE_CHECKING:
    from tests.callbacks.conftest import Batch, Lab
    from tests.callbacks.continual.conftest import AnchoringMethod

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.15
]


class Pairs(LightningModule):
    """A batch that does not tell what is poisoned."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return batch[:2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_penalty_is_logged(lab: Lab, anchoring: AnchoringMethod, accumulate: int) -> None:
    module, trainer = anchoring.module(), lab.trainer(anchoring.callback(), accumulate=accumulate)
    trainer.fit(module, anchoring.loader())
    penalties = anchoring.by_hand(lab.settings(accumulate=accumulate)).notes
    assert penalties[2] == 0  # no clean sample
    assert float(trainer.callback_metrics["anchoring/penalty"]) == pytest.approx(penalties[-1], rel=1e-4)
    # One pass of the student and one of the anchor, in its mode, for each batch.
    assert module.modes == [True, False] * 10


@pytest.mark.parametrize(("hooks", "clean_only"), [((), False), ((Pairs,), True), ((Pairs,), False)])
def test_all_samples_count(
    lab: Lab, anchoring: AnchoringMethod, hooks: tuple[type[LightningModule], ...], clean_only: bool
) -> None:
    module = anchoring.module(*hooks)
    lab.trainer(Anchoring(anchoring.strength, clean_only=clean_only)).fit(module, anchoring.loader())
    expected = anchoring.by_hand(clean_only=False).net
    lab.assert_equal_states(module.net, expected)
    assert lab.distance(expected, anchoring.by_hand().net) > 1e-4


def test_batch_without_a_clean_sample_adds_zero(anchoring: AnchoringMethod) -> None:
    images, labels, _, originals, index = anchoring.batches()[0]
    batch = Sample(images, labels, torch.ones(8, dtype=torch.bool), originals, index)
    logits = torch.ones(8, 3).cumsum(1).requires_grad_()
    term = Anchoring().distance(logits, torch.zeros(8, 3), batch)
    assert term == 0
    (gradient,) = torch.autograd.grad(term, logits)
    assert torch.equal(gradient, torch.zeros(8, 3))


def test_gradient_passes_through_the_student_only(lab: Lab, anchoring: AnchoringMethod) -> None:
    """Also where the images ask for one."""
    seen: list[tuple[bool, bool]] = []

    class Looks(Anchoring):
        def distance(self, logits: Tensor, anchor_logits: Tensor, batch: object) -> Tensor:
            seen.append((logits.requires_grad, anchor_logits.requires_grad))
            return super().distance(logits, anchor_logits, batch)

    class Explains(LightningModule):
        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0].requires_grad_(), batch[1]]

    lab.trainer(Looks(anchoring.strength), epochs=1).fit(anchoring.module(Explains), anchoring.loader())
    assert seen == [(True, False)] * 5


def test_half_precision_weights(lab: Lab, anchoring: AnchoringMethod) -> None:
    callback, module = Anchoring(anchoring.strength), anchoring.module()
    trainer = lab.trainer(callback, epochs=1, plugins=[HalfPrecision("bf16-true")])
    trainer.fit(module, anchoring.loader())
    assert callback.state_dict()["anchor"]["net.5.weight"].dtype == torch.bfloat16
    assert trainer.callback_metrics["anchoring/penalty"] > 0


class NoisyEvenInEvaluation(LightningModule):
    """Draws from the global state, in the anchor's pass too; one of its layers stays in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x + 0.1 * torch.randn_like(x))
        return logits

    def on_train_start(self) -> None:
        self.get_submodule("net.1").eval()

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        """Leave the global state alone."""


def test_leaves_no_trace(lab: Lab, anchoring: AnchoringMethod) -> None:
    """A strength so small that it changes no weight leaves the plain run: buffers, random numbers, modes, hooks."""
    runs = []
    for callbacks in ([], [Anchoring(strength=1e-30)]):
        module = anchoring.module(NoisyEvenInEvaluation)
        torch.manual_seed(3)
        lab.trainer(*callbacks).fit(module, anchoring.loader(shuffle=True))
        runs.append((module, torch.rand(())))
    assert all(torch.equal(runs[0][0].state_dict()[key], value) for key, value in runs[1][0].state_dict().items())
    assert runs[0][1] == runs[1][1]
    modes, plain = ([layer.training for layer in run[0].modules()] for run in runs)
    assert modes == plain
    assert not all(modes)
    assert not runs[1][0]._forward_hooks
    assert not runs[1][0].frozen.weight.requires_grad


def test_exception_in_the_anchors_pass_leaves_no_trace(lab: Lab, anchoring: AnchoringMethod) -> None:
    class Fails(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise OSError("broken")
            logits: Tensor = super().forward(x)
            return logits

    module = anchoring.module(Fails)
    before = dict(module.named_parameters())
    with pytest.raises(OSError, match="broken"):
        lab.trainer(Anchoring(anchoring.strength)).fit(module, anchoring.loader())
    assert all(layer.training for layer in module.modules())
    assert all(p is before[name] for name, p in module.named_parameters())
    assert not module._forward_hooks


def test_second_fit_anchors_anew(lab: Lab, anchoring: AnchoringMethod) -> None:
    callback, module = Anchoring(anchoring.strength), anchoring.module()
    lab.trainer(callback, epochs=1).fit(module, anchoring.loader())
    weights = copy.deepcopy(module.state_dict())
    lab.trainer(callback, epochs=1).fit(module, anchoring.loader())
    anchor = callback.state_dict()["anchor"]
    assert all(torch.equal(anchor[name], tensor) for name, tensor in weights.items())


def test_tied_weights_and_buffers_that_no_checkpoint_holds(lab: Lab, anchoring: AnchoringMethod) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(36, 36), nn.Linear(36, 36)
            self.second.weight = self.first.weight
            self.shift: Tensor
            self.register_buffer("shift", torch.ones(36), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.second(self.first(x.flatten(1)).tanh() + self.shift)
            return logits[:, :3]

    net, callback = Tied(), Anchoring(anchoring.strength)
    module, anchor = anchoring.module(net=net), copy.deepcopy(net).eval()
    trainer = lab.trainer(callback, epochs=1)
    trainer.fit(module, anchoring.loader())
    assert float((net.first.weight - anchor.first.weight).detach().abs().max()) > 1e-3
    images = anchoring.batches()[0][0]
    with torch.no_grad():
        net.shift += 1  # the anchor has its own
        expected = anchoring.penalty(net(images), anchor(images), list(range(8)))
        term = callback.compute(trainer, module, (images,))
    torch.testing.assert_close(anchoring.strength * term, expected)


def test_layers_with_a_second_name(lab: Lab, anchoring: AnchoringMethod) -> None:
    """And a `training_step` that calls a submodule: both the anchor's pass and that for the logits swap tensors."""

    class Aliases(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.get_submodule("net")(batch[0]), batch[1])

    module, expected = anchoring.module(Aliases), anchoring.module(Aliases)
    module.encoder, module.norm = module.net.get_submodule("0"), module.net.get_submodule("1")
    before = [*module.net.parameters(), *module.net.buffers()]
    for each in (module, expected):
        lab.trainer(Anchoring(anchoring.strength, clean_only=False)).fit(each, anchoring.loader())
    assert all(a is b for a, b in zip([*module.net.parameters(), *module.net.buffers()], before, strict=True))
    lab.assert_equal_states(module.net, expected.net, atol=0)


def test_checkpoint_of_another_model_is_refused(lab: Lab, anchoring: AnchoringMethod) -> None:
    class Resumes(Anchoring):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.load_state_dict({"anchor": {"other": torch.zeros(1)}})
            super().on_fit_start(trainer, pl_module)

    with pytest.raises(
        MisconfigurationException, match=r"`Resumes` resumes with the anchor .*: 'frozen.bias' is in one"
    ):
        lab.trainer(Resumes(anchoring.strength)).fit(anchoring.module(), anchoring.loader())


def test_strength_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`strength` to be a non-negative float, but got -1\.0"):
        Anchoring(strength=-1.0)
