"""The student alone: cross entropy, on mixed images if asked. The baseline of every comparison."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...mixing import mixup
from ...ops.checks import check_positive
from .base import Batch, Method, Outputs, check_share


class Alone(Method):
    """CE; with ``alpha`` on mixup images, lam ~ Beta(alpha, alpha); with ``label_smoothing`` in [0, 1]."""

    needs_teacher = False

    def __init__(self, alpha: float | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if alpha is not None:
            check_positive("Alone", alpha=alpha)
        check_share("Alone: label_smoothing", label_smoothing)
        self.alpha, self.label_smoothing = alpha, label_smoothing

    def prepare(self, images: Tensor, target: Tensor, target_neg: Tensor | None = None) -> Batch:
        return Batch(images, target) if self.alpha is None else Batch(*mixup(images, target, alpha=self.alpha))

    def terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        ce = self._ce(student.logits, batch.target)
        if batch.target_mixed is not None and batch.lam is not None:
            ce = batch.lam * ce + (1 - batch.lam) * self._ce(student.logits, batch.target_mixed)
        return {"ce": ce}

    def _ce(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
