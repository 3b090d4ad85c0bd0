"""NST: CE + weight * L_NST on every stage."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...nst_loss import nst_loss
from ...ops.checks import check_weight
from .base import WARMUP, Batch, Method, Outputs


class NST(Method):
    """Huang & Wang 2017, with the polynomial kernel. RepDistiller's and mdistiller's weight, for CIFAR, is 50."""

    stages = "all"
    maps = True

    def __init__(self, weight: float = 1.0, warmup: float = WARMUP) -> None:
        super().__init__(warmup)
        check_weight("NST", weight=weight)
        self.weight = weight

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {
            "ce": F.cross_entropy(student.logits, batch.target),
            "nst": self.weighted(nst_loss(student.features, teacher.features)),
        }
