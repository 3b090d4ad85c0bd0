"""Rotated views and triplets against plain loops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.training.triplets import TripletDataset, collate_triplets, triplet_labels
from kdkernels.training.views import rotate_views


@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_rotations(views: int) -> None:
    images = torch.randn(3, 2, 5, 5)
    out = rotate_views(images, views)
    assert out.shape == (3 * views, 2, 5, 5)
    for b in range(3):
        for r in range(views):
            for i in range(5):
                for j in range(5):
                    # counter-clockwise: what was in the last column is in the first row
                    source = [(i, j), (j, 4 - i), (4 - i, 4 - j), (4 - j, i)][r]
                    assert torch.equal(out[views * b + r, :, i, j], images[b, :, source[0], source[1]])


def test_invalid_rotations() -> None:
    with pytest.raises(ValueError, match=r"square.*\(1, 1, 4, 6\)"):
        rotate_views(torch.zeros(1, 1, 4, 6))
    with pytest.raises(ValueError, match="1, 2, 3 or 4, got 5"):
        rotate_views(torch.zeros(1, 1, 4, 4), 5)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        rotate_views(torch.zeros(4, 4))
    assert torch.equal(rotate_views(torch.ones(1, 1, 4, 6), 1), torch.ones(1, 1, 4, 6))
    assert rotate_views(torch.zeros(0, 1, 4, 4)).shape == (0, 1, 4, 4)


LABELS = [5, 0, 5, 2, 0, 5, 2, 2, 2, 2, 9]  # 9 has one image


def numbered() -> TensorDataset:
    return TensorDataset(torch.arange(len(LABELS)).float()[:, None, None, None], torch.tensor(LABELS))


@pytest.mark.parametrize("labels", [LABELS, torch.tensor(LABELS), None], ids=["list", "tensor", "read"])
def test_triplets(labels: list[int] | torch.Tensor | None) -> None:
    data = TripletDataset(numbered(), labels, generator=torch.Generator().manual_seed(0))
    assert len(data) == len(LABELS)
    seen: dict[int, Counter[int]] = {i: Counter() for i in range(len(LABELS))}
    other: Counter[int] = Counter()
    draws = 600
    for _ in range(draws):
        for i in range(len(data)):
            anchor, positive, negative, y, y_negative = data[i]
            a, p, n = (int(x.item()) for x in (anchor, positive, negative))
            assert a == i
            assert y == LABELS[i] == LABELS[p]
            assert LABELS[n] == y_negative != y
            assert p != i or LABELS.count(y) == 1
            seen[i][p] += 1
            if i == 10:
                other[y_negative] += 1
    # every other image of the class is drawn, evenly; five standard deviations are allowed
    for i, counts in seen.items():
        candidates = [j for j, y in enumerate(LABELS) if y == LABELS[i] and j != i] or [i]
        assert sorted(counts) == candidates
        for c in counts.values():
            share = draws / len(candidates)
            assert abs(c - share) <= 5 * share**0.5
    # classes are drawn evenly, whatever their sizes (3, 2 and 5 images)
    assert sorted(other) == [0, 2, 5]
    assert all(abs(c - draws / 3) < 5 * (draws * 2 / 9) ** 0.5 for c in other.values())


def test_a_generator_repeats_its_draws() -> None:
    draws = [
        [TripletDataset(numbered(), LABELS, torch.Generator().manual_seed(seed)).draw(i) for i in range(len(LABELS))]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_triplets(workers: int) -> None:
    loader = DataLoader(
        TripletDataset(numbered()), batch_size=4, shuffle=True, collate_fn=collate_triplets, num_workers=workers
    )
    anchors = []
    for images, target, target_neg in loader:
        b = len(target)
        assert images.shape == (3 * b, 1, 1, 1)
        numbers = [int(x) for x in images.flatten()]
        for i in range(b):  # a plain loop over the rows 3i, 3i+1, 3i+2
            anchor, positive, negative = numbers[3 * i : 3 * i + 3]
            assert LABELS[anchor] == LABELS[positive] == target[i]
            assert LABELS[negative] == target_neg[i] != target[i]
            anchors.append(anchor)
        assert triplet_labels(target, target_neg).tolist() == [LABELS[n] for n in numbers]
    assert sorted(anchors) == list(range(len(LABELS)))


def test_invalid_data_sets() -> None:
    images = torch.zeros(3, 1, 2, 2)
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        TripletDataset(images, [0, 1])
    with pytest.raises(ValueError, match=r"two or more classes.*\[4\]"):
        TripletDataset(images, [4, 4, 4])
    with pytest.raises(IndexError):
        TripletDataset(images, [0, 1, 1])[3]
    assert TripletDataset(images, [0, 1, 1])[-1][3] == 1
