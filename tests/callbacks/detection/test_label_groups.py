"""Grouping by label, principal components and cuts, against numpy and brute force."""

import numpy as np
import torch

from lightning_bd.callbacks.detection.label_groups import FEWEST_IMAGES, best_cut, label_groups, principal_components


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_groups_hold_the_rows_of_their_label() -> None:
    features, labels = draw(60, 3) + 100, torch.tensor([-5, 1000, 7])[torch.arange(60) % 3]
    groups = list(label_groups(features, labels))
    assert [group.label for group in groups] == [-5, 7, 1000]
    for group in groups:
        assert group.rows.tolist() == [row for row in range(60) if labels[row] == group.label]
        own = features[group.rows].double()
        torch.testing.assert_close(group.mean, own.mean(dim=0))
        torch.testing.assert_close(group.centred, own - own.mean(dim=0))


def test_labels_with_few_images_are_left_out() -> None:
    labels = torch.tensor([0] * FEWEST_IMAGES + [1] * (FEWEST_IMAGES - 1) + [2])
    assert [group.label for group in label_groups(draw(len(labels), 2), labels)] == [0]


def test_constant_features_are_exactly_zero() -> None:
    for images in (37, 49, 101):
        (group,) = label_groups(draw(1, 50).expand(images, 50), torch.zeros(images, dtype=torch.int64))
        assert not group.centred.any()
        assert principal_components(group.centred, 3).shape == (images, 0)


def test_principal_components_are_those_of_the_singular_value_decomposition() -> None:
    for count, dimensions in ((40, 6), (6, 40)):
        centred = draw(count, dimensions).double()
        centred -= centred.mean(dim=0)
        left, values, _right = np.linalg.svd(centred.numpy(), full_matrices=False)
        found = principal_components(centred, 3).abs()
        torch.testing.assert_close(found, torch.from_numpy(left * values)[:, :3].abs())


def test_directions_without_variance_are_left_out() -> None:
    flat = torch.zeros(40, 5).double()
    flat[:, :2] = draw(40, 2).double()
    assert principal_components(flat - flat.mean(dim=0), 4).shape == (40, 2)


def test_best_cut_is_the_best_of_all() -> None:
    for seed in range(20):
        values = torch.randn(15, generator=torch.Generator().manual_seed(seed)).double().pow(3).round(decimals=1)
        values -= values.mean()
        found = best_cut(values)

        def spread(above: torch.Tensor, values: torch.Tensor = values) -> float:
            return sum(float((part - part.mean()).square().sum()) for part in (values[above], values[~above]))

        every = [values > cut for cut in sorted(set(values.tolist()))[:-1]]
        assert abs(spread(found) - min(map(spread, every))) < 1e-9
        assert 0 < int(found.sum()) < 15
