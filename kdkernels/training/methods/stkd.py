"""STKD: mixed images for both networks, mixed-label CE and KL in one call."""

from __future__ import annotations

from torch import Tensor

from ...mixing import mixup
from ...ops.checks import check_weight
from ...stkd_loss import STKDLoss
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
        divergence: str = "forward",
        beta: float | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        check_weight("STKD", ce_weight=ce_weight, kd_weight=kd_weight)
        check_share("STKD: label_smoothing", label_smoothing)
        self.alpha = alpha
        self.stkd = STKDLoss(
            temperature,
            ce_weight,
            kd_weight,
            decouple,
            label_smoothing,
            divergence=divergence,
            beta=beta,
            standardize=standardize,
        )

    def set_option(self, option: str, value: float) -> None:
        setattr(self if option == "alpha" else self.stkd, option, value)

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return Batch(*mixup(images, target, alpha=self.alpha))

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        loss = self.stkd(student.logits, teacher.logits, batch.target, batch.target_mixed, batch.lam)
        return {"stkd": loss}
