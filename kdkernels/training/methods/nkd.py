"""NKD: CE + weight * L_NKD."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...nkd_loss import nkd_loss
from ...ops.checks import check_positive, check_weight
from .base import Batch, Method, Outputs


class NKD(Method):
    """Yang et al. 2023. The authors take gamma = 1.5 and T = 1 for ImageNet's ResNets, 3.5 and 3 for CIFAR-100's."""

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__()
        check_weight("NKD", weight=weight, gamma=gamma)
        check_positive("NKD", temperature=temperature)
        self.weight, self.temperature, self.gamma = weight, temperature, gamma

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        nkd = nkd_loss(student.logits, teacher.logits, batch.target, temperature=self.temperature, gamma=self.gamma)
        return {"ce": F.cross_entropy(student.logits, batch.target), "nkd": self.weight * nkd}
