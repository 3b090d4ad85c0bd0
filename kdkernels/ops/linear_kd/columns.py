"""Which columns of the vocabulary this process has, and how numbers of all of them come together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .record import LinearKD


class Columns(NamedTuple):
    """This process has the columns begin .. begin + size of ``total``; without a group, all of them."""

    begin: int
    size: int
    total: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def alone(cls, x: LinearKD) -> Columns:
        size = x.options.vocab_size or x.weight.shape[0]
        return cls(0, size, size)

    @property
    def share(self) -> int:
        """How many columns a rank has on average: the same number on all of them."""
        return self.size if self.group is None else -(-self.total // dist.get_world_size(self.group))

    def add(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(ranks, ...): every rank's."""
        if self.group is None:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of ids of the whole vocabulary: where they are here, any place for the others; and which are here."""
        place = ids - self.begin
        here = (place >= 0) & (place < self.size)
        return place.clamp(0, self.size - 1), here


class Softmax(NamedTuple):
    """Of every row the largest logit, and log Z relative to it: their sum would round away small differences."""

    top: Tensor  # (n, 1)
    log_z: Tensor  # (n, 1)


def softmaxes(columns: Columns, tops: list[Tensor], sums: list[tuple[int, float, Tensor]]) -> list[Softmax]:
    """Over all columns from those of each rank: ``tops`` of the logits, and sums of exp((z - top) / T).

    Each sum is (which top, T, (n, 1)). One all-gather.
    """
    parts = columns.gather(torch.stack([*tops, *(s for _, _, s in sums)]))
    all_tops = parts[:, : len(tops)]
    top = all_tops.amax(0)
    # a rank whose columns are all -inf adds exp(-inf - top) = 0 times its sum, which may be NaN
    found = []
    for i, (which, temperature, _) in enumerate(sums):
        weight = ((all_tops[:, which] - top[which]) / temperature).exp()
        part = parts[:, len(tops) + i]
        found.append(Softmax(top[which], (part * weight).masked_fill(weight == 0, 0).sum(0).log()))
    return found
