"""The student alone: cross entropy, on mixed images if asked. The baseline of every comparison."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...mixing import mixup
from .base import Batch, Method, Outputs


class Alone(Method):
    """CE; with ``alpha`` on mixup images, lam ~ Beta(alpha, alpha)."""

    needs_teacher = False

    def __init__(self, alpha: float | None = None) -> None:
        super().__init__()
        self.alpha = alpha

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return Batch(images, target) if self.alpha is None else Batch(*mixup(images, target, alpha=self.alpha))

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        ce = F.cross_entropy(student.logits, batch.target)
        if batch.target_mixed is not None and batch.lam is not None:
            ce = batch.lam * ce + (1 - batch.lam) * F.cross_entropy(student.logits, batch.target_mixed)
        return {"ce": ce}
