"""AMD: (1 - kd_weight) CE + kd_weight * T^2 KL + weight * L_AMD on every stage."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...amd_loss import amd_loss
from ...kd_loss import kd_loss
from ...ops.checks import check_weight
from .base import Batch, Method, Outputs, check_share


class AMD(Method):
    """Jeon et al. 2023. Layer weights and their reduction are ours, see ``kdkernels.amd_loss``; 0.2 is for "area"."""

    stages = "all"
    maps = True
    scales: ClassVar[dict[str, str]] = {"ce": "1 - kd_weight", "kd": "kd_weight"}

    def __init__(
        self,
        weight: float = 0.2,
        kd_weight: float = 0.9,
        temperature: float = 4.0,
        local_weight: float = 0.0,
        layer_weights: list[float] | str | None = "area",
        layer_reduction: str = "sum",
    ) -> None:
        super().__init__()
        check_weight("AMD", weight=weight)
        check_share("AMD: kd_weight", kd_weight)
        check_weight("AMD", local_weight=local_weight)
        self.weight, self.kd_weight, self.temperature = weight, kd_weight, temperature
        self.local_weight, self.layer_weights, self.layer_reduction = local_weight, layer_weights, layer_reduction

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        amd = amd_loss(
            student.features,
            teacher.features,
            local_weight=self.local_weight,
            layer_weights=self.layer_weights,
            layer_reduction=self.layer_reduction,
        )
        terms = {"ce": (1 - self.kd_weight) * F.cross_entropy(student.logits, batch.target), "amd": self.weight * amd}
        if self.kd_weight:
            kd = kd_loss(student.logits, teacher.logits, temperature=self.temperature)
            terms["kd"] = self.kd_weight * kd
        return terms
