"""The networks that CORSD (arXiv 2305.00918) trains with the network and drops afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batch_norm import BatchNorm1d, BatchNorm2d
from .ops.checks import compute_dtype


class _SepConv(nn.Sequential):
    """Depthwise 3x3 stride 2 - 1x1 - BN - ReLU - depthwise 3x3 - 1x1 - BN - ReLU, without biases."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False),
            nn.Conv2d(inputs, inputs, 1, bias=False),
            BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            BatchNorm2d(outputs),
            nn.ReLU(),
        )


class RelationNetwork(nn.Module):
    """Two images' features of one stage to a relation score (B,) in (0, 1) and class logits (B, K).

    widths: channels of the two images' features together, then of every SepConv block's output; one width means no
        blocks.
    """

    def __init__(self, widths: Sequence[int], hidden: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(_SepConv(a, b) for a, b in pairwise(widths)))
        self.relation = nn.Sequential(
            nn.Linear(widths[-1], hidden), BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()
        )
        self.classes = nn.Linear(widths[-1], num_classes)

    def forward(self, anchor: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(torch.cat([anchor, other], 1)).mean((2, 3))
        return self.relation(h)[:, 0], self.classes(h)


class LogitRelation(nn.Module):
    """G on [softmax z_j; a class's prototype]: G(own class) - G(a random other class), summed over a triplet's images.

    A prototype is the running sum of its images' softmax outputs, a unit vector at the start. Our reading: triplets are
    averaged, and G sees a prototype divided by its total, as the sums grow without bound.
    """

    prototypes: Tensor
    group: dist.ProcessGroup | None = None  # the running sums are those of all ranks' images

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(2 * num_classes, 1), BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 1), nn.Sigmoid()
        )
        self.register_buffer("prototypes", torch.eye(num_classes))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.to(compute_dtype(logits)).softmax(1)
        classes = p.shape[1]
        other = (labels + torch.randint(1, classes, labels.shape, device=labels.device)) % classes
        prototypes = (self.prototypes / self.prototypes.sum(1, keepdim=True)).to(p.dtype)
        own, wrong = (self.score(torch.cat([p, prototypes[y]], 1)) for y in (labels, other))
        if self.training:
            with torch.no_grad():
                sums = torch.zeros_like(self.prototypes).index_add_(0, labels, p.detach().to(self.prototypes.dtype))
                if self.group is not None:
                    dist.all_reduce(sums, group=self.group)
                self.prototypes.add_(sums)
        return 3 * (own.to(p.dtype) - wrong.to(p.dtype)).sum() / max(labels.shape[0], 1)
