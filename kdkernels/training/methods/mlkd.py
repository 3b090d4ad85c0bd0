"""MLKD: CE on the upright images + correlation, supervised and alignment terms over the rotated views of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...mlkd_loss import MLKDLoss
from ...ops.checks import check_weight
from ..views import rotate_views
from .base import Batch, Method, Outputs, pooled


class MLKD(Method):
    """Ding et al. 2021, on the pooled output of the last stage. Its heads train with the student and are dropped."""

    stages = "last"
    needs_widths = True
    needs_classes = False
    relational = True

    def __init__(
        self,
        correlation_weight: float = 50.0,
        supervised_weight: float = 1.0,
        alignment_weight: float = 20.0,
        views: int = 4,
    ) -> None:
        super().__init__()
        self.weights: dict[str, Any] = {
            "correlation_weight": correlation_weight,
            "supervised_weight": supervised_weight,
            "alignment_weight": alignment_weight,
        }
        check_weight("MLKD", **self.weights)
        self.views = views
        self.loss: MLKDLoss | None = None

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        widths = (pooled(x).shape[1] for x in (student.features[0], teacher.features[0]))
        self.loss = MLKDLoss(*widths, views=self.views, **self.weights).to(student.logits.device)

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return Batch(rotate_views(images, self.views), target)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        assert self.loss is not None
        views = len(student.logits) // max(len(batch.target), 1)
        terms = {"ce": F.cross_entropy(student.logits[::views], batch.target)}
        if views == self.views:  # in evaluation images come as they are
            self.loss.group = self.group
            terms["mlkd"] = self.loss(pooled(student.features[0]), pooled(teacher.features[0]), batch.target)
        return terms
