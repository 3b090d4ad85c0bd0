"""AT: CE + weight * L_AT on every stage."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...at_loss import at_loss
from ...ops.checks import check_weight
from .base import WARMUP, Batch, Method, Outputs


class AT(Method):
    """Zagoruyko & Komodakis 2017, attention transfer. RepDistiller's and mdistiller's weight, for CIFAR, is 1000."""

    stages = "all"
    maps = True

    def __init__(self, weight: float = 10.0, p: float = 2.0, warmup: float = WARMUP) -> None:
        super().__init__(warmup)
        check_weight("AT", weight=weight)
        self.weight, self.p = weight, p

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {
            "ce": F.cross_entropy(student.logits, batch.target),
            "at": self.weighted(at_loss(student.features, teacher.features, p=self.p)),
        }
