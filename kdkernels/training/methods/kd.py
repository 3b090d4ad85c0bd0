"""KD: (1 - weight) CE + weight * T^2 KL, or another divergence."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...kd_loss import KDLoss
from .base import Batch, Method, Outputs, check_share


class KD(Method):
    """Hinton et al. 2015, with the weights that RepDistiller made usual."""

    scales: ClassVar[dict[str, str]] = {"ce": "1 - weight"}

    def __init__(
        self,
        weight: float = 0.9,
        temperature: float = 4.0,
        divergence: str = "forward",
        beta: float | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        check_share("KD: weight", weight)
        self.weight = weight
        self.kd = KDLoss(temperature, divergence=divergence, beta=beta, standardize=standardize)

    def set_option(self, option: str, value: float) -> None:
        setattr(self.kd if option == "temperature" else self, option, value)

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {
            "ce": (1 - self.weight) * F.cross_entropy(student.logits, batch.target),
            "kd": self.weight * self.kd(student.logits, teacher.logits),
        }
