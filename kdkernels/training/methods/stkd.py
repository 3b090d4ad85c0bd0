"""STKD: mixed images for both networks, mixed-label CE and KL in one call."""

from __future__ import annotations

from torch import Tensor

from ...mixing import mixup
from ...ops.checks import check_weight
from ...stkd_loss import stkd_loss
from .base import Batch, Method, Outputs, check_share


class STKD(Method):
    """Zhao et al. 2021, as read in ``kdkernels.stkd_loss``. The teacher sees every mixed batch."""

    includes = ("ce", "kd")

    def __init__(
        self,
        alpha: float = 1.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        temperature: float = 4.0,
        decouple: tuple[float, float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_weight("STKD", ce_weight=ce_weight, kd_weight=kd_weight)
        check_share("STKD: label_smoothing", label_smoothing)
        self.alpha, self.ce_weight, self.kd_weight = alpha, ce_weight, kd_weight
        self.temperature, self.decouple, self.label_smoothing = temperature, decouple, label_smoothing

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return Batch(*mixup(images, target, alpha=self.alpha))

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        loss = stkd_loss(
            student.logits,
            teacher.logits,
            batch.target,
            batch.target_mixed,
            batch.lam,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            decouple=self.decouple,
            label_smoothing=self.label_smoothing,
        )
        return {"stkd": loss}
