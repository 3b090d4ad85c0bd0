"""DIST: CE + weight * L_DIST."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...dist_loss import dist_loss
from ...ops.checks import check_positive, check_weight
from .base import Batch, Method, Outputs


class DIST(Method):
    """Huang et al. 2022, with the authors' weight of 2; they take T = 4 for CIFAR-100."""

    relational = True

    def __init__(self, weight: float = 2.0, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        check_weight("DIST", weight=weight, beta=beta, gamma=gamma)
        check_positive("DIST", temperature=temperature)
        self.weight, self.temperature, self.beta, self.gamma = weight, temperature, beta, gamma

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        dist = dist_loss(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            group=self.group,
        )
        return {"ce": F.cross_entropy(student.logits, batch.target), "dist": self.weight * dist}
