"""SP: CE + weight * L_SP on the last stage."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...ops.checks import check_weight
from ...sp_loss import sp_loss
from .base import WARMUP, Batch, Method, Outputs


class SP(Method):
    """Tung & Mori 2019, with RepDistiller's weight."""

    stages = "last"
    relational = True

    def __init__(self, weight: float = 3000.0, warmup: float = WARMUP) -> None:
        super().__init__(warmup)
        check_weight("SP", weight=weight)
        self.weight = weight

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {
            "ce": F.cross_entropy(student.logits, batch.target),
            "sp": self.weighted(sp_loss(student.features, teacher.features, group=self.group)),
        }
