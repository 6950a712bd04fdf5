"""Detectors of pytorch-ood give the scores they give on their own; what can be saved is saved."""

import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bd.callbacks.detection.base import FeatureDetector, InputDetector
from lightning_bd.callbacks.detection.energy import Energy
from lightning_bd.callbacks.detection.pytorch_ood import PyTorchOOD
from lightning_bd.functional.detection import rank_auroc

O = pytest.importorskip("pytorch_ood.detector")  # noqa: E741

torch.manual_seed(0)
HEAD = nn.Linear(8, 3)
WEIGHT, BIAS = HEAD.weight.detach(), HEAD.bias.detach()

ON_FEATURES: dict[str, Callable[[], Any]] = {
    "DICE": lambda: O.DICE(None, WEIGHT, BIAS, 0.5),
    "fDBD": lambda: O.fDBD(None, HEAD),
    "GMM": lambda: O.GMM(None),
    "LTS": lambda: O.LTS(None, HEAD),
    "MCM": lambda: O.MCM(None, WEIGHT),
    "Mahalanobis": lambda: O.Mahalanobis(None),
    "NCI": lambda: O.NCI(None, HEAD),
    "NNGuide": lambda: O.NNGuide(None, HEAD),
    "PNML": lambda: O.PNML(None, HEAD),
    "RMD": lambda: O.RMD(None),
    "SHE": lambda: O.SHE(None, lambda features: features[:, :3]),
    "ViM": lambda: O.ViM(None, 2, WEIGHT, BIAS),
    "KNN": lambda: O.KNN(None, k=5),
}
ON_LOGITS: dict[str, Callable[[], Any]] = {
    "EnergyBased": lambda: O.EnergyBased(None),
    "Entropy": lambda: O.Entropy(None),
    "KLMatching": lambda: O.KLMatching(None),
    "TemperatureScaling": lambda: O.TemperatureScaling(None),
    "WeightedEBO": lambda: O.WeightedEBO(None, torch.ones(1, 3)),
    "OpenMax": lambda: O.OpenMax(None, tailsize=5, alpha=2),
}
ON_IMAGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "ASH": lambda model: O.ASH(model[:3], model[3:]),
    "GradNorm": lambda model: O.GradNorm(model),
    "GradUncertainty": lambda model: O.GradUncertainty(model),
    "Gram": lambda model: O.Gram(model[3:], [model[:2], model[2]], 3),
    "MCD": lambda model: O.MCD(model, samples=3),
    "MahalanobisODIN": lambda model: O.MahalanobisODIN(model[:5]),
    "MultiMahalanobis": lambda model: O.MultiMahalanobis([model[:2], model[2]]),
    "NACUE": lambda model: O.NACUE(model, [model[2]]),
    "ODIN": lambda model: O.ODIN(model),
    "RankFeat": lambda model: O.RankFeat(model[:3], model[3:]),
    "ReAct": lambda model: O.ReAct(model[:3], model[3:]),
    "VRA": lambda model: O.VRA(model[:3], model[3:]),
}
NOT_FITTED = ("LTS", "MCM", "EnergyBased", "Entropy", "WeightedEBO")
# Objects of scikit-learn and NumPy, lists and other detectors.
NOT_SAVED = ("KNN", "OpenMax", "Gram", "MahalanobisODIN", "MultiMahalanobis", "NACUE")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and labels of three classes."""
    labels = torch.arange(count) % 3
    features = torch.rand(count, 8, generator=generator(seed)) + 2.0 * nn.functional.one_hot(labels, 8)
    return features, features[:, :3] * 2.0, labels


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(96, 3)
    )


def images(seed: int, count: int = 12) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=generator(seed))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(seed, 45), torch.arange(45) % 3) for seed in (2, 3)]


@pytest.mark.parametrize("name", [*ON_FEATURES, *ON_LOGITS])
def test_gives_the_scores_of_pytorch_ood(name: str) -> None:
    kind, make = ("features", ON_FEATURES[name]) if name in ON_FEATURES else ("logits", ON_LOGITS[name])
    theirs, ours = make(), PyTorchOOD(make())
    assert isinstance(ours, FeatureDetector)
    assert ours.name == f"ood_{name.lower()}"
    features, logits, labels = draw(0)
    if theirs.requires_fit:
        getattr(theirs, f"fit_{kind}")(features if kind == "features" else logits, labels)
        # Batches that are put together are the same as all at once.
        ours.begin_fit()
        for part in torch.split(torch.arange(60), 25):
            ours.update_fit(features[part], logits[part], labels[part])
        with torch.no_grad():
            ours.finish_fit()
    features, logits, _ = draw(1)
    with torch.no_grad():
        expected = getattr(theirs, f"predict_{kind}")(features if kind == "features" else logits).float()
    scores = ours.score(features, logits)
    assert scores.isfinite().all()
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("name", ON_IMAGES)
def test_gives_the_scores_of_pytorch_ood_on_images(name: str) -> None:
    model = network()
    own = copy.deepcopy(model).eval()
    theirs, ours = ON_IMAGES[name](own), PyTorchOOD(ON_IMAGES[name](model))
    assert isinstance(ours, InputDetector)
    if theirs.requires_fit:
        torch.manual_seed(2)
        theirs.fit(batches())
        torch.manual_seed(2)
        ours.fit(model, iter(batches()))
    torch.manual_seed(3)
    expected = theirs.predict(images(4)).detach().float()
    torch.manual_seed(3)
    with torch.inference_mode():
        scores = ours.score(model, images(4))
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("name", ON_IMAGES)
def test_leaves_no_trace(name: str) -> None:
    model = network()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    detector = PyTorchOOD(ON_IMAGES[name](model))
    assert isinstance(detector, InputDetector)
    state = torch.get_rng_state()
    if detector.needs_fit:
        detector.fit(model, batches())
    scores = detector.score(model, images(4))
    assert not scores.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in (*ON_FEATURES, *ON_LOGITS) if name not in (*NOT_SAVED, *NOT_FITTED)])
def test_saved_and_loaded(name: str) -> None:
    make = {**ON_FEATURES, **ON_LOGITS}[name]
    detector, fresh = PyTorchOOD(make()), PyTorchOOD(make())
    assert isinstance(detector, FeatureDetector)
    assert isinstance(fresh, FeatureDetector)
    detector.fit(*draw(0))
    state = detector.state_dict()
    assert state["fitted"]
    assert all(type(value) is Tensor and not value.requires_grad for value in state["fitted"].values())
    # What another was fitted to before does not stay.
    fresh.fit(*draw(5))
    fresh.load_state_dict(copy.deepcopy(state))
    assert torch.equal(fresh.score(*draw(1)[:2]), detector.score(*draw(1)[:2]))
    assert fresh.state_key == detector.state_key
    # It can still be fitted, to the same.
    fresh.fit(*draw(0))
    assert torch.equal(fresh.score(*draw(1)[:2]), detector.score(*draw(1)[:2]))


def test_classes_of_another_fit_do_not_stay() -> None:
    two, three = PyTorchOOD(O.KLMatching(None)), PyTorchOOD(O.KLMatching(None))
    assert isinstance(two, FeatureDetector)
    assert isinstance(three, FeatureDetector)
    features, logits, labels = draw(0)
    kept = labels < 2
    two.fit(features[kept], logits[kept], labels[kept])
    three.fit(features, logits, labels)
    three.load_state_dict(two.state_dict())
    assert torch.equal(three.score(features, logits), two.score(features, logits))


@pytest.mark.parametrize("name", ["ReAct", "VRA"])
def test_on_images_saved_and_loaded(name: str) -> None:
    model = network()
    detector, fresh = (PyTorchOOD(ON_IMAGES[name](model)) for _ in range(2))
    assert isinstance(detector, InputDetector)
    assert isinstance(fresh, InputDetector)
    detector.fit(model, batches())
    fresh.load_state_dict(detector.state_dict())
    assert torch.equal(fresh.score(model, images(4)), detector.score(model, images(4)))


@pytest.mark.parametrize("name", NOT_SAVED)
def test_says_what_is_not_saved(name: str) -> None:
    model = network()
    detector = PyTorchOOD({**ON_FEATURES, **ON_LOGITS}[name]() if name not in ON_IMAGES else ON_IMAGES[name](model))
    assert detector.state_dict() == {"fitted": {}, "weights": None}
    if isinstance(detector, FeatureDetector):
        detector.fit(*draw(0))
    else:
        assert isinstance(detector, InputDetector)
        detector.fit(model, batches())
    with pytest.warns(UserWarning, match=f"What `{name}` was fitted to is not saved"):
        state = detector.state_dict()
    detector.load_state_dict(state)
    assert not detector.is_ready


def test_detectors_and_settings_are_told_apart() -> None:
    adapted = [PyTorchOOD(made) for made in (O.KNN(None, k=5), O.KNN(None, k=6), O.GMM(None))]
    assert len({detector.state_key for detector in adapted}) == 3


def test_a_copy_is_of_the_same_kind() -> None:
    detector = copy.deepcopy(PyTorchOOD(O.Mahalanobis(None), layer="body"))
    assert isinstance(detector, FeatureDetector)
    detector.fit(*draw(0))
    assert detector.layer == "body"


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


def test_in_a_trainer() -> None:
    module = Module()
    known, far = (TensorDataset(x, torch.arange(12) % 3) for x in (images(4), 5.0 + images(5)))
    clean = DataLoader(TensorDataset(torch.cat([x for x, _ in batches()]), torch.arange(90) % 3), batch_size=32)
    detectors = [
        PyTorchOOD(O.EnergyBased(None)),
        Energy(),
        PyTorchOOD(O.KNN(None, k=3, normalize=False), dataloader=clean),
        PyTorchOOD(O.ReAct(module.net[:3], module.net[3:]), dataloader=clean),
    ]
    trainer = Trainer(
        callbacks=detectors,  # type: ignore[arg-type]
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, [DataLoader(known, batch_size=5), DataLoader(far, batch_size=5)], verbose=False)
    theirs, ours, neighbours, react = ([d.scores[key].score for key in ("set0", "set1")] for d in detectors)
    assert torch.equal(torch.cat(theirs), torch.cat(ours))
    assert float(rank_auroc(torch.cat(neighbours), torch.arange(24) >= 12)) == 1.0
    assert torch.cat(react).shape == (24,)


def test_without_data() -> None:
    detector = PyTorchOOD(O.GMM(None))
    assert isinstance(detector, FeatureDetector)
    detector.begin_fit()
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        detector.finish_fit()
    with pytest.raises(RuntimeError, match="has to be fitted before it can score"):
        detector.score(*draw(0)[:2])
    model = network()
    on_images = PyTorchOOD(O.ReAct(model[:3], model[3:]))
    assert isinstance(on_images, InputDetector)
    with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
        on_images.fit(model, [])


@pytest.mark.parametrize("wrong", [None, "knn", O.KNN, nn.Identity()])
def test_not_a_detector(wrong: object) -> None:
    with pytest.raises(ValueError, match="Expected argument `detector` to be a detector of pytorch-ood"):
        PyTorchOOD(wrong)  # type: ignore[arg-type]


def test_layer_of_one_that_is_given_images() -> None:
    with pytest.raises(ValueError, match="Expected argument `layer` to be None, since `ODIN` is given the images"):
        PyTorchOOD(O.ODIN(network()), layer="body")


def test_the_library_does_not_need_pytorch_ood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_ood"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    spec = importlib.util.spec_from_file_location("again", inspect.getfile(PyTorchOOD))
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
