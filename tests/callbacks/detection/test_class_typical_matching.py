"""CTM against its formula in float64."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bd.callbacks.detection.class_typical_matching import ClassTypicalMatching
from lightning_bd.callbacks.detection.features import Head

CLASSES, WIDTH = 4, 6


def data(seed: int = 0, count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Features around class centres, logits that are right for about two thirds, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99)) + 1.0
    labels = torch.arange(count) % CLASSES
    features = centres[labels] + torch.randn(count, WIDTH, generator=generator)
    logits = F.one_hot(labels, CLASSES).float() + 0.7 * torch.randn(count, CLASSES, generator=generator)
    return features, logits, labels


def head() -> Head:
    generator = torch.Generator().manual_seed(5)
    return Head(torch.randn(CLASSES, WIDTH, generator=generator), torch.zeros(CLASSES))


def by_formula(
    queries: Tensor, reference: Literal["class_means", "classifier"], *, center: bool, only_correct: bool
) -> Tensor:
    features, logits, labels = data()
    features = features.double()
    mean = features.mean(dim=0) if center else torch.zeros(WIDTH).double()
    scores = []
    for query in queries.double():
        cosines = []
        for label in range(CLASSES):
            members = [i for i in range(len(labels)) if int(labels[i]) == label]
            if only_correct:
                members = [i for i in members if int(logits[i].argmax()) == label]
            typical = head().weight[label].double() if reference == "classifier" else features[members].mean(dim=0)
            a, b = query - mean, typical - mean
            cosines.append(float(a @ b) / (float(a @ a) * float(b @ b)) ** 0.5)
        scores.append(-max(cosines))
    return torch.tensor(scores)


@pytest.mark.parametrize("reference", ["class_means", "classifier"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("only_correct", [False, True])
def test_is_the_formula(reference: Literal["class_means", "classifier"], center: bool, only_correct: bool) -> None:
    detector = ClassTypicalMatching(reference=reference, center=center, only_correct=only_correct)
    detector.fit(*data(), head())
    queries = data(seed=1)[0]
    expected = by_formula(queries, reference, center=center, only_correct=only_correct)
    scores = detector.score(queries, torch.zeros(len(queries), CLASSES))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_streaming_mean_is_that_in_float64() -> None:
    features, logits, labels = data(count=400)
    # The sum in float32 loses the small images among the large ones.
    features = features * torch.logspace(-3, 5, 400)[:, None]
    streaming, whole = ClassTypicalMatching(only_correct=False), ClassTypicalMatching(only_correct=False)
    streaming.begin_fit()
    for parts in zip(torch.split(features, 9), torch.split(logits, 9), torch.split(labels, 9), strict=True):
        streaming.update_fit(*parts)
    streaming.finish_fit()
    whole.fit(features, logits, labels)
    means = torch.stack([features[labels == label].double().mean(dim=0) for label in range(CLASSES)])
    for detector in (streaming, whole):
        torch.testing.assert_close(detector.fitted["typical"], F.normalize(means), rtol=0, atol=1e-14)


@pytest.mark.parametrize("center", [False, True])
def test_class_without_a_correct_image_is_represented_by_all_of_them(center: bool) -> None:
    features, logits, labels = data()
    logits[labels == 2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    detector = ClassTypicalMatching(center=center)
    with pytest.warns(UserWarning, match=r"no image of class 2 is classified correctly\. All images of the class"):
        detector.fit(features, logits, labels)
    correct = logits.argmax(dim=1) == labels
    groups = [(labels == label) & (correct if label != 2 else torch.ones(60, dtype=torch.bool)) for label in range(4)]
    means = torch.stack([features[group].double().mean(dim=0) for group in groups])
    torch.testing.assert_close(detector.fitted["typical"], F.normalize(means - center * features.double().mean(dim=0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassTypicalMatching(only_correct=False).fit(features, logits, labels)
        ClassTypicalMatching(reference="classifier").fit(features, logits, labels, head())


@pytest.mark.parametrize("center", [False, True])
def test_scale_of_the_features_does_not_matter(center: bool) -> None:
    features, logits, labels = data()
    queries = data(seed=1)[0]
    scores = []
    for scale in (1.0, 2.0**-70, 2.0**50):
        detector = ClassTypicalMatching(center=center)
        detector.fit(features * scale, logits, labels)
        scores.append(detector.score(queries * scale, logits))
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_length_of_an_image_s_features_does_not_matter() -> None:
    detector = ClassTypicalMatching()
    detector.fit(*data())
    queries = data(seed=1)[0]
    scores = detector.score(queries, torch.zeros(60, CLASSES))
    assert torch.equal(detector.score(queries * 2.0 ** torch.arange(60)[:, None], torch.zeros(60, CLASSES)), scores)
    assert detector.score(torch.zeros(2, WIDTH), torch.zeros(2, CLASSES)).tolist() == [0.0, 0.0]


def test_unknown_images_score_higher() -> None:
    detector = ClassTypicalMatching()
    detector.fit(*data())
    known = detector.score(data(seed=1)[0], torch.zeros(60, CLASSES))
    unknown = detector.score(-data(seed=2)[0], torch.zeros(60, CLASSES))
    assert known.quantile(0.9) < unknown.quantile(0.1)


@pytest.mark.parametrize("reference", ["class_means", "classifier"])
def test_state_travels(reference: Literal["class_means", "classifier"]) -> None:
    detector = ClassTypicalMatching(reference=reference, center=True)
    detector.fit(*data(), head())
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    other = ClassTypicalMatching(reference=reference, center=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    queries = data(seed=1)[0]
    logits = torch.zeros(60, CLASSES)
    assert torch.equal(other.score(queries, logits), detector.score(queries, logits))


def test_refitting_starts_anew() -> None:
    once, twice = ClassTypicalMatching(), ClassTypicalMatching()
    once.fit(*data())
    twice.fit(*data(seed=3))
    twice.begin_fit()
    twice.update_fit(*data(seed=4))
    twice.fit(*data())
    assert torch.equal(once.fitted["typical"], twice.fitted["typical"])
    assert once.state_key == twice.state_key
    assert once.state_key != ClassTypicalMatching(center=True).state_key


def test_a_later_change_of_the_model_s_rows_does_not_reach_it() -> None:
    detector, rows = ClassTypicalMatching(reference="classifier"), head()
    detector.begin_fit(rows)
    expected = F.normalize(rows.weight.double())
    rows.weight.zero_()
    detector.update_fit(*data())
    detector.finish_fit()
    torch.testing.assert_close(detector.fitted["typical"], expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `reference` to be one of .* but got 'rows'\."):
        ClassTypicalMatching(reference="rows")  # type: ignore[arg-type]
    features, logits, labels = data()
    with pytest.raises(ValueError, match=r"needs the model's last linear layer.*leave out `layer`"):
        ClassTypicalMatching(reference="classifier").fit(features, logits, labels)
    kept = labels != 1
    with pytest.raises(ValueError, match="but got none of class 1: fit on a `dataloader` that holds every class"):
        ClassTypicalMatching().fit(features[kept], logits[kept], labels[kept])
    for reference in ("class_means", "classifier"):
        empty = ClassTypicalMatching(reference=reference)
        with pytest.raises(ValueError, match="Expected clean data to fit on, but got no image"):
            empty.fit(features[:0], logits[:0], labels[:0], head())
    with pytest.raises(ValueError, match=r"Expected labels in \[0, 4\).* but got -1"):
        ClassTypicalMatching().fit(features, logits, labels - 1)
    with pytest.raises(RuntimeError, match="has to be fitted before it can score"):
        ClassTypicalMatching().score(features, logits)
