"""MLLD: ce_weight * CE + kd_weight * L_MLLD, on the images and on strongly augmented ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...mlld_loss import mlld_loss
from ...ops.checks import check_weight
from .base import Batch, Method, Outputs


class MLLD(Method):
    """Jin et al. 2023. ``strong`` makes the strongly augmented images of a batch; the authors' is RandAugment(2, 10).

    Both networks see the images and the strong ones as one batch, and the cross entropy is over both. Without
    ``strong`` there are only the images as they come.
    """

    relational = True

    def __init__(
        self, ce_weight: float = 0.1, kd_weight: float = 0.9, strong: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        check_weight("MLLD", ce_weight=ce_weight, kd_weight=kd_weight)
        self.ce_weight, self.kd_weight, self.strong = ce_weight, kd_weight, strong

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        if self.strong is None:
            return Batch(images, target)
        # side by side, so that micro-batches one after another are one batch of the same order
        return Batch(torch.stack([images, self.strong(images)], 1).flatten(0, 1), target)

    @property
    def fixed_views(self) -> int:
        return int(self.strong is None)

    def own_rows(self, images: int) -> slice:
        return slice(None, None, 1 if self.strong is None else 2)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        views = max(1, len(student.logits) // max(len(batch.target), 1))  # one in evaluation
        pairs = [x.logits[view::views] for view in range(views) for x in (student, teacher)]
        ce = torch.stack([F.cross_entropy(logits, batch.target) for logits in pairs[::2]]).sum()
        return {"ce": self.ce_weight * ce, "mlld": self.kd_weight * mlld_loss(*pairs, group=self.group)}
