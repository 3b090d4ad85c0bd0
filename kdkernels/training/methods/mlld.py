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
    ``strong`` there are only the images as they come. The Grams are those of one process and one micro-batch.
    """

    def __init__(
        self, ce_weight: float = 0.1, kd_weight: float = 0.9, strong: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        check_weight("MLLD", ce_weight=ce_weight, kd_weight=kd_weight)
        self.ce_weight, self.kd_weight, self.strong = ce_weight, kd_weight, strong

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return Batch(images if self.strong is None else torch.cat([images, self.strong(images)]), target)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        views = [x.logits.split(max(len(batch.target), 1)) for x in (student, teacher)]  # one in evaluation
        ce = torch.stack([F.cross_entropy(logits, batch.target) for logits in views[0]]).sum()
        pairs = [logits for pair in zip(*views, strict=True) for logits in pair]
        return {"ce": self.ce_weight * ce, "mlld": self.kd_weight * mlld_loss(*pairs)}
