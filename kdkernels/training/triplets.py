"""Triplets from any labelled data set: an image, another one of its class, and one of another class."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from .loaders import over

Triplet = tuple[Tensor, Tensor, Tensor, int, int]


class TripletDataset(Dataset[Triplet]):
    """(anchor, positive, negative, label, label of the negative) for every image of ``dataset``.

    The positive is drawn from the other images of the anchor's class; the only image of a class is its own
    positive. The negative is a random image of a class drawn uniformly from the others, whatever their sizes.

    Args:
        dataset: anything with len() and [i], whose items are an image tensor or a tuple that starts with one.
        labels: one int per item; None reads those of a TensorDataset, of a Subset's data set or ``dataset.targets``,
            and failing that ``dataset[i][1]`` of every item once.
        generator: a CPU generator for the draws. None uses PyTorch's own random state, which a DataLoader seeds again
            for each worker and epoch; a given generator is copied unchanged to every worker in every epoch.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if labels is None:
            labels = labels_of(dataset)
        self.dataset, self.generator = dataset, generator
        self.labels = [int(y) for y in labels]
        if len(self.labels) != len(dataset):
            raise ValueError(f"TripletDataset: {len(self.labels)} labels for {len(dataset)} images")
        self.members: dict[int, list[int]] = {}
        self.position: list[int] = []  # of each image in its class
        for i, y in enumerate(self.labels):
            self.position.append(len(self.members.setdefault(y, [])))
            self.members[y].append(i)
        self.classes = sorted(self.members)
        if len(self.classes) < 2:
            raise ValueError(f"TripletDataset: needs images of two or more classes, got classes {self.classes}")
        self.class_position = {y: i for i, y in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, index: int) -> tuple[int, int]:
        """The indices of a positive and a negative for image ``index``."""
        own = self.labels[index]
        positive = self._other(self.members[own], self.position[index])
        members = self.members[self._other(self.classes, self.class_position[own])]
        return positive, members[self._below(len(members))]

    def _other(self, items: list[int], position: int) -> int:
        """A random item, not the one at ``position`` unless it is the only one."""
        if len(items) == 1:
            return items[0]
        return items[(position + 1 + self._below(len(items) - 1)) % len(items)]

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _image(self, index: int) -> Tensor:
        item = self.dataset[index]
        return item[0] if isinstance(item, (tuple, list)) else item

    def __getitem__(self, index: int) -> Triplet:
        if not -len(self) <= index < len(self):
            raise IndexError(f"TripletDataset: index {index} of {len(self)} images")
        index %= len(self)
        positive, negative = self.draw(index)
        images = self._image(index), self._image(positive), self._image(negative)
        return *images, self.labels[index], self.labels[negative]


def labels_of(dataset: Any) -> Sequence[int] | Tensor:
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        return [int(whole[i]) for i in dataset.indices]
    if (targets := getattr(dataset, "targets", None)) is not None:
        return targets
    return [int(dataset[i][1]) for i in range(len(dataset))]


def triplet_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Triplets of a loader's labelled data set, drawn in its order: of B images, batches of B // 3 triplets.

    A loader of triplets, or one with a ``collate_fn`` of its own, comes back as it is.

    Raises:
        ValueError: a data set without len() and [i], or a loader without a batch size.
    """
    if isinstance(loader.dataset, TripletDataset) or loader.collate_fn is not default_collate:
        return loader
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "triplets can be made from a DataLoader with a batch_size over a data set with len() and [i]; for another "
            "give batches of triplets yourself: kdkernels.training.triplets has TripletDataset and collate_triplets"
        )
    images = len(cast(Sized, loader.sampler))
    size = max(2, loader.batch_size // 3)
    drop_last = loader.drop_last or (images > 1 and images % size == 1)  # batch norm needs two rows
    return over(loader, TripletDataset(loader.dataset), collate_triplets, batch_size=size, drop_last=drop_last)


def collate_triplets(samples: Sequence[Triplet]) -> tuple[Tensor, Tensor, Tensor]:
    """(3 B, ...) images, rows 3i, 3i+1, 3i+2 = anchor, positive, negative, and (B,) labels of anchor and negative."""
    images = torch.stack([image for sample in samples for image in sample[:3]])
    target, target_neg = (torch.tensor([sample[k] for sample in samples]) for k in (3, 4))
    return images, target, target_neg


def triplet_labels(target: Tensor, target_neg: Tensor) -> Tensor:
    """(3 B,) labels of the rows that ``collate_triplets`` makes: the anchor's, the positive's and the negative's."""
    return torch.stack([target, target, target_neg], 1).flatten()
