"""Detectors in a plain Lightning project: one line, and nothing of the user's changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bd.callbacks.detection.base import DatasetDetector, FeatureDetector, InputDetector
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.datamodules import DigitsDataModule
from lightning_bd.poisoning import Poison
from lightning_bd.triggers import BadNets

Batch = tuple[Tensor, ...]
Loader = DataLoader[Batch]


class Distance(FeatureDetector):
    """Of the features to their mean."""

    name = "distance"
    needs_fit = True

    def _begin(self, head: Head | None) -> None:
        assert head is not None
        self._sum, self._count, self._batches = torch.zeros(head.weight.shape[1]).double(), 0, 0

    def _update(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._sum += features.double().sum(0)
        self._count += len(features)
        self._batches += 1

    def _finish(self) -> dict[str, Tensor]:
        return {"mean": self._sum / self._count}

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        distances: Tensor = (features - self.fitted["mean"]).norm(dim=1)
        return distances


class Again(Distance):
    """The same under another class."""


class Largest(FeatureDetector):
    """Negative of the largest logit."""

    name = "largest"

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        return -logits.amax(dim=1)


class Slope(InputDetector):
    """Of the largest logit over the image."""

    name = "slope"

    def _score(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.enable_grad():
            images.requires_grad_()
            (gradient,) = torch.autograd.grad(model(images).amax(dim=1).sum(), images)
        slopes: Tensor = gradient.flatten(1).norm(dim=1)
        return slopes


class FromMean(DatasetDetector):
    """Distance to the label's mean."""

    name = "from_mean"

    def _score(self, features: Tensor, labels: Tensor) -> Tensor:
        means = torch.stack([features[labels == label].mean(0) for label in labels])
        distances: Tensor = (features - means).norm(dim=1)
        return distances


class Foreign(LightningModule):
    """A user's module, which never heard of detectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 8)
        self.encoder = nn.Sequential(nn.Flatten(), self.first, nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        logits: Tensor = self.head(self.encoder(x))
        return logits

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("logits", self(batch[0]).mean())

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        logits: Tensor = self(batch[0])
        return logits


def loader(count: int, shift: float = 0.0, seed: int = 1) -> Loader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 2, 2, generator=generator) + shift
    return DataLoader(TensorDataset(images, torch.randint(3, (count,), generator=generator)), batch_size=7)


def trainer(*callbacks: Callback) -> Trainer:
    return Trainer(
        callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def images_of(loader: Loader) -> Tensor:
    return torch.cat([batch[0] for batch in loader])


@pytest.fixture
def sets() -> dict[str, Loader]:
    return {"id": loader(20, seed=2), "near": loader(15, 0.3, seed=3), "far": loader(25, 3.0, seed=4)}


def test_one_line_scores_and_logs(sets: dict[str, Loader]) -> None:
    model, detector = Foreign().eval(), Distance(dataloader=loader(30))
    logged = trainer(detector).test(model, dataloaders=list(sets.values()), verbose=False)[0]
    with torch.no_grad():
        mean = model.encoder(images_of(loader(30))).double().mean(0)
        scores = {name: (model.encoder(images_of(each)) - mean).norm(dim=1).float() for name, each in sets.items()}
    for number, name in enumerate(sets):
        torch.testing.assert_close(detector.scores[f"set{number}"].score, scores[name])
    values, truth = torch.cat([scores["id"], scores["far"]]), [0] * 20 + [1] * 25
    assert logged["distance/set2/auroc"] == pytest.approx(roc_auc_score(truth, values))
    assert logged["distance/set2/aupr_out"] == pytest.approx(average_precision_score(truth, values))
    for key in ("aupr_in", "fpr95_out", "fpr95_in", "tpr_at_fpr1"):
        assert 0 <= logged[f"distance/set1/{key}"] <= 1
    assert not any(key.startswith("distance/set0") for key in logged)


def test_sets_have_the_names_of_a_dictionary_and_any_may_be_in_distribution(sets: dict[str, Loader]) -> None:
    detector = Largest(in_distribution="far")
    logged = trainer(detector).test(Foreign(), dataloaders=sets, verbose=False)[0]
    assert {key.split("/")[1] for key in logged if key.startswith("largest/")} == {"id", "near"}
    far, near = detector.scores["far"].score, detector.scores["near"].score
    assert logged["largest/near/auroc"] == pytest.approx(roc_auc_score([0] * 25 + [1] * 15, torch.cat([far, near])))


def test_detectors_share_one_pass(sets: dict[str, Loader]) -> None:
    model, fit = Foreign(), loader(30)
    first, second = Distance(dataloader=fit), Again(dataloader=fit)
    trainer(first, Largest(), second).test(model, dataloaders=sets, verbose=False)
    # Five batches to fit on, 3 + 3 + 4 to test.
    assert model.passes == 5 + 10
    assert torch.equal(first.scores["far"].score, second.scores["far"].score)


def test_an_input_detector_has_gradients_under_inference_mode(sets: dict[str, Loader]) -> None:
    model = Foreign().eval()
    model.head.requires_grad_(False)
    slope, distance = Slope(), Distance(dataloader=loader(30))
    trainer(slope, distance).test(model, dataloaders=sets, verbose=False)
    images = images_of(sets["near"]).requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).amax(dim=1).sum(), images)
    torch.testing.assert_close(slope.scores["near"].score, gradient.flatten(1).norm(dim=1))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.head.parameters()] == [False, False]
    assert all(p.requires_grad for p in model.encoder.parameters())
    # Its own passes are not taken for the test's.
    with torch.no_grad():
        mean = model.encoder(images_of(loader(30))).double().mean(0)
        expected = (model.encoder(images_of(sets["near"])) - mean).norm(dim=1).float()
    torch.testing.assert_close(distance.scores["near"].score, expected)


def test_the_users_results_are_those_without_detectors(sets: dict[str, Loader]) -> None:
    def run(*callbacks: Callback) -> tuple[dict[str, float], dict[str, Tensor], Tensor, list[bool]]:
        torch.manual_seed(5)
        model = Foreign()
        logged = trainer(*callbacks).test(model, dataloaders=sets, verbose=False)
        own = {key: value for each in logged for key, value in each.items() if key.startswith("logits")}
        return own, model.state_dict(), torch.rand(3), [module.training for module in model.modules()]

    plain, watched = run(), run(Slope(), Distance(dataloader=loader(30)), Largest())
    assert plain[0] == watched[0]
    assert all(torch.equal(value, watched[1][key]) for key, value in plain[1].items())
    assert torch.equal(plain[2], watched[2])
    assert plain[3] == watched[3]


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_nothing_stays_on_the_model_after_an_error_either(sets: dict[str, Loader]) -> None:
    class Breaks(Foreign):
        def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().test_step(batch, batch_idx, dataloader_idx)
            if dataloader_idx == 1:
                raise RuntimeError("the user's own error")

    model = Foreign()
    trainer(Largest(), Slope()).test(model, dataloaders=sets, verbose=False)
    assert hooks_on(model) == 0
    broken = Breaks()
    with pytest.raises(RuntimeError, match="the user's own error"):
        trainer(Largest(), Slope()).test(broken, dataloaders=sets, verbose=False)
    assert hooks_on(broken) == 0


def test_what_was_fitted_travels_in_a_checkpoint(sets: dict[str, Loader], tmp_path: Path) -> None:
    model, fitted = Foreign(), Distance(dataloader=loader(30))
    first = trainer(fitted)
    first.test(model, dataloaders=sets, verbose=False)
    first.save_checkpoint(tmp_path / "with.ckpt", weights_only=False)
    content = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert fitted.state_key in content["callbacks"]
    # No data to fit on is needed any more.
    again, same = Foreign(), Distance()
    trainer(same).test(again, dataloaders=sets, ckpt_path=tmp_path / "with.ckpt", verbose=False, weights_only=True)
    assert again.passes == 10
    assert torch.equal(same.scores["far"].score, fitted.scores["far"].score)


def test_other_weights_are_fitted_anew(sets: dict[str, Loader]) -> None:
    model, detector = Foreign(), Distance(dataloader=loader(30))
    tester = trainer(detector)
    tester.test(model, dataloaders=sets, verbose=False)
    tester.test(model, dataloaders=sets, verbose=False)
    assert model.passes == 5 + 10 + 10
    with torch.no_grad():
        model.first.weight.mul_(1.01)
    tester.test(model, dataloaders=sets, verbose=False)
    assert model.passes == 5 + 10 + 10 + 15


def test_two_of_one_kind_are_told_apart(sets: dict[str, Loader]) -> None:
    pair = Distance(dataloader=loader(30)), Again(dataloader=loader(30), in_distribution="far")
    logged = trainer(*pair).test(Foreign(), dataloaders=sets, verbose=False)[0]
    assert "distance/far/auroc" in logged
    assert "distance_2/id/auroc" in logged
    assert Largest(layer="encoder").state_key != Largest().state_key


def test_predicting_only_scores(sets: dict[str, Loader]) -> None:
    detector = Distance(dataloader=loader(30))
    trainer(detector).predict(Foreign(), dataloaders=sets["far"])
    assert len(detector.scores["set0"].score) == 25
    assert detector.scores["set0"].index.tolist() == list(range(25))


def test_a_data_set_is_scored_as_a_whole_and_judged_by_its_flags() -> None:
    data = DigitsDataModule(poison=Poison(BadNets(size=2), rate=0.5, mode="static"), subset=60, batch_size=16)

    class Images(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.encoder[1] = nn.Linear(64, 8)

    class Poisoned(LightningDataModule):
        def setup(self, stage: str) -> None:
            data.setup(stage)

        def test_dataloader(self) -> object:
            return data.train_dataloader()

        def on_after_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
            return data.on_after_batch_transfer(batch, dataloader_idx)

    detector = FromMean()
    logged = trainer(detector).test(Images(), datamodule=Poisoned(), verbose=False)[0]
    known = detector.scores["set0"]
    assert known.poisoned is not None
    assert int(known.poisoned.sum()) == 30
    assert sorted(known.index.tolist()) == list(range(60))
    assert logged["from_mean/set0/auroc"] == pytest.approx(roc_auc_score(known.poisoned, known.score))


def test_a_datamodule_gives_the_data_to_fit_on_and_names_the_sets() -> None:
    data = DigitsDataModule(poison=Poison(BadNets(size=2)), subset=60, test_subset=50, batch_size=16)

    class Images(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.encoder[1], self.head = nn.Linear(64, 8), nn.Linear(8, 10)

    model, detector = Images().eval(), Distance()
    logged = trainer(detector).test(model, datamodule=data, verbose=False)[0]
    assert "distance/poisoned/auroc" in logged
    clean = data.train_images.read(torch.arange(60)) / 255
    with torch.no_grad():
        torch.testing.assert_close(detector.fitted["mean"], model.encoder(clean).double().mean(0), rtol=1e-6, atol=1e-7)


class WithoutImages(Foreign):
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        return


@pytest.mark.parametrize(
    ("detector", "model", "chosen", "message"),
    [
        (Distance(), Foreign(), None, "needs clean data to fit on. Pass `dataloader=...`"),
        (Distance(dataloader=[]), Foreign(), None, "Expected clean data to fit on, but got no batch"),
        (Largest(), Foreign(), ["id"], "needs something to tell apart"),
        (Largest(in_distribution="di"), Foreign(), None, "no test set `di`.*there are id, near, far"),
        (Largest(layer="encodr"), Foreign(), None, "no layer `encodr`. Did you mean `encoder`"),
        (Largest(), WithoutImages(), None, "ran no linear layer"),
    ],
)
def test_what_cannot_work_is_refused(
    detector: FeatureDetector, model: LightningModule, chosen: list[str] | None, message: str, sets: dict[str, Loader]
) -> None:
    loaders = sets if chosen is None else {name: sets[name] for name in chosen}
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer(detector).test(model, dataloaders=loaders, verbose=False)
    assert hooks_on(model) == 0


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_an_empty_set_is_named(sets: dict[str, Loader]) -> None:
    nothing: Loader = DataLoader(TensorDataset(torch.empty(0, 3, 2, 2), torch.empty(0).long()), batch_size=2)
    with pytest.raises(MisconfigurationException, match="The test set `near` has no image"):
        trainer(Largest()).test(Foreign(), dataloaders={**sets, "near": nothing}, verbose=False)


def test_broken_features_are_named(sets: dict[str, Loader]) -> None:
    model = Foreign()
    with torch.no_grad():
        model.first.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="Expected finite features, but those of 7 of 7 images hold NaN"):
        trainer(Largest()).test(model, dataloaders=sets, verbose=False)


def test_batches_without_images_are_refused() -> None:
    class Mapping(Foreign):
        def test_step(  # type: ignore[override]
            self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self(batch["image"])

    batches: Any = DataLoader([{"image": torch.rand(3, 2, 2)}] * 4, batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"`batch\[0\]` and `batch\[1\]`, but got dict"):
        trainer(Largest()).test(Mapping(), dataloaders=[batches, batches], verbose=False)


def test_unfitted_detectors_refuse_to_score() -> None:
    with pytest.raises(RuntimeError, match="`Distance` has to be fitted"):
        Distance().score(torch.rand(2, 8), torch.rand(2, 3))
    with pytest.raises(ValueError, match="as many features as logits and labels, but got 2, 2 and 3"):
        Distance().fit(torch.rand(2, 8), torch.rand(2, 3), torch.zeros(3), Head(torch.rand(3, 8), torch.zeros(3)))
    with pytest.raises(ValueError, match=r"`features` to be \(N, D\) floating"):
        Largest().score(torch.rand(2), torch.rand(2, 3))
    with pytest.raises(ValueError, match="as many features as labels, and at least one, but got 2 and 3"):
        FromMean().score(torch.rand(2, 8), torch.zeros(3))


def test_other_data_are_fitted_anew(sets: dict[str, Loader]) -> None:
    detector = Distance(dataloader=loader(30))
    tester, model = trainer(detector), Foreign()
    tester.test(model, dataloaders=sets, verbose=False)
    before = detector.fitted["mean"]
    detector.dataloader = loader(40, seed=9)
    tester.test(model, dataloaders=sets, verbose=False)
    assert not torch.equal(before, detector.fitted["mean"])


class Digits(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.encoder[1], self.head = nn.Linear(64, 8), nn.Linear(8, 10)


def digits(count: int, shift: float) -> Loader:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count)) + shift
    return DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=7)


def test_an_earlier_calls_datamodule_does_not_count() -> None:
    data = DigitsDataModule(poison=Poison(BadNets(size=2)), subset=60, test_subset=50, batch_size=16)
    detector = Distance()
    tester, model = trainer(detector), Digits()
    tester.test(model, datamodule=data, verbose=False)
    with pytest.raises(MisconfigurationException, match="needs clean data to fit on"):
        tester.test(model, dataloaders=[digits(20, 0), digits(20, 1)], verbose=False)
    detector.dataloader = digits(30, 0)
    logged = tester.test(model, dataloaders=[digits(20, 0), digits(20, 1)], verbose=False)[0]
    assert "distance/set1/auroc" in logged
    assert not any("poisoned" in key for key in logged)


def test_a_loader_of_ones_own_beside_a_datamodule() -> None:
    data = DigitsDataModule(poison=Poison(BadNets(size=2)), subset=60, test_subset=50, batch_size=16)
    model, own = Digits().eval(), digits(30, 0)
    detector = Distance(dataloader=own)
    trainer(detector).test(model, datamodule=data, verbose=False)
    with torch.no_grad():
        expected = model.encoder(images_of(own)).double().mean(0)
    torch.testing.assert_close(detector.fitted["mean"], expected, rtol=1e-6, atol=1e-7)
    theirs = Distance(dataloader=data.clean_fit_dataloader())
    trainer(theirs).test(model, datamodule=data, verbose=False)
    assert not torch.equal(theirs.fitted["mean"], detector.fitted["mean"])


def test_an_in_distribution_set_does_not_hinder_prediction_nor_loading(sets: dict[str, Loader]) -> None:
    detector = Distance(dataloader=loader(30), in_distribution="id")
    trainer(detector).predict(Foreign(), dataloaders=sets["far"])
    assert detector.state_key == Distance().state_key


def test_nested_loaders_have_nested_names(sets: dict[str, Loader]) -> None:
    loaders = {"id": sets["id"], "ood": [sets["near"], sets["far"]]}
    logged = trainer(Largest()).test(Foreign(), dataloaders=loaders, verbose=False)[0]
    assert {key.rpartition("/")[0] for key in logged if key.startswith("largest")} == {"largest/ood/0", "largest/ood/1"}


class Nothing(IterableDataset[tuple[Tensor, ...]]):
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(())


def test_all_sets_empty() -> None:
    nothing = DataLoader(Nothing())
    with pytest.raises(MisconfigurationException, match="The test set `set0` has no image"):
        trainer(Largest()).test(Foreign(), dataloaders=[nothing, nothing], verbose=False)


def test_two_passes_in_a_step_are_refused(sets: dict[str, Loader]) -> None:
    class Twice(Foreign):
        def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])
            self(torch.zeros_like(batch[0]))

    with pytest.raises(MisconfigurationException, match="ran several times in this step"):
        trainer(Largest()).test(Twice(), dataloaders=sets, verbose=False)


class WithoutForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net(batch[0])


def test_a_module_without_forward_is_scored_but_not_fitted(sets: dict[str, Loader]) -> None:
    model, detector = WithoutForward(), Largest()
    trainer(detector).test(model, dataloaders=sets, verbose=False)
    expected = -model.net(images_of(sets["far"])).detach().amax(dim=1)
    torch.testing.assert_close(detector.scores["far"].score, expected)
    for needy in (Distance(dataloader=loader(30)), Slope()):
        with pytest.raises(MisconfigurationException, match="has no `forward`"):
            trainer(needy).test(model, dataloaders=sets, verbose=False)


def test_labels_that_are_none() -> None:
    class Named(Foreign):
        def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            logits: Tensor = self(batch[0])
            return logits

    named: Any = DataLoader([(torch.rand(3, 2, 2), "a.png")] * 4, batch_size=2)  # type: ignore[arg-type]
    detector = Largest()
    trainer(detector).predict(Named(), dataloaders=named)
    assert detector.scores["set0"].label.tolist() == [-1] * 4
    with pytest.raises(MisconfigurationException, match="fitted on images and their labels"):
        trainer(Distance(dataloader=named)).predict(Named(), dataloaders=named)


class Odd(DatasetDetector):
    name = "odd"

    def _score(self, features: Tensor, labels: Tensor) -> Tensor:
        return features[1:, 0]


def test_scores_of_a_data_set_are_checked(sets: dict[str, Loader]) -> None:
    with pytest.raises(ValueError, match=r"`Odd` gave scores of shape \(24,\) for 25 images"):
        trainer(Odd()).predict(Foreign(), dataloaders=sets["far"])
