"""Digits against scikit-learn."""

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_bd.datamodules import DigitsDataModule


def test_the_parts_are_the_whole_set() -> None:
    data = DigitsDataModule()
    train, test = data.load(train=True), data.load(train=False)
    digits = load_digits()
    assert len(train) + len(test) == len(digits.target)
    expected = torch.from_numpy(digits.images)
    together = torch.cat([train.images, test.images])[:, 0].double() / 255 * 16
    assert (together - together.round()).abs().max() < 0.04
    # Sorted sums do not depend on the order of the images.
    assert torch.equal(together.round().sum((1, 2)).sort().values, expected.sum((1, 2)).sort().values)
    for label in range(10):
        share = int((test.labels == label).sum()) / int((torch.from_numpy(digits.target) == label).sum())
        assert abs(share - 0.2) < 0.01


def test_the_cut_does_not_depend_on_seeds() -> None:
    first, second = DigitsDataModule(seed=1, split_seed=1).test_images, DigitsDataModule().test_images
    assert first.fingerprint() == second.fingerprint()


def test_labels_belong_to_their_images() -> None:
    data = DigitsDataModule()
    digits = load_digits()
    known = {image.astype(int).tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)}
    train = data.load(train=True)
    levels = (train.images[:, 0].double() / 255 * 16).round().to(torch.int64).numpy()
    assert all(known[image.tobytes()] == int(label) for image, label in zip(levels, train.labels, strict=True))


def test_not_augmented_unless_asked() -> None:
    assert DigitsDataModule().augment == "none"
    assert DigitsDataModule(augment="crop").augment == "crop"


def test_enlarged_images_keep_label_and_mean() -> None:
    small, large = DigitsDataModule(), DigitsDataModule(image_size=32)
    assert large.image_shape == (1, 32, 32)
    assert torch.equal(small.train_images.labels, large.train_images.labels)
    positions = torch.arange(20)
    means = [data.train_images.read(positions).float().mean((1, 2, 3)) for data in (small, large)]
    # Bilinear weights at the border differ.
    assert (means[0] - means[1]).abs().max() < 2


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="`image_size` to be an integer of at least 8, but got 4"):
        DigitsDataModule(image_size=4)
