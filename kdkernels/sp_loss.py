"""Similarity-Preserving Knowledge Distillation (Tung & Mori, ICCV 2019, arXiv 1907.09682).

Q = reshape(A) in R^{B x D};   K = Q Q^T;   G[i] = K[i] / max(||K[i]||_2, eps)
L = (1 / B^2) * sum over layer pairs of ||G_teacher - G_student||_F^2

R = (2 / B^2) (G_s - G_t);   H_i = (R_i - (R_i . G_i) G_i) / ||K_i||;   dL/dQ_s = (H + H^T) Q_s
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .ops.checks import check_choice, check_positive, layer_pairs
from .ops.gram import sp_gram
from .ops.gram.op import ROW_NORMS

SP_REDUCTIONS = ("batchmean", "sum")


def sp_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    row_norm: str = "l2",
    reduction: str = "batchmean",
    eps: float = 1e-12,
) -> Tensor:
    """The squared distance between the batch similarity matrices of student and teacher.

    Args:
        student, teacher: (B, ...) features of one layer each, or two sequences of them (layer pairs, whose losses are
            summed). They agree in B; everything behind it may differ. float16, bfloat16, float32 or float64, any
            strides: channels_last is read without a copy. No gradient flows to the teacher.
        row_norm: "l2" (the paper) or "l1" (torchdistill's).
        reduction: "batchmean" divides by B^2, "sum" does not.
        eps: rows of the Gram matrix with a smaller norm are divided by eps.

    Returns:
        A float32 scalar (float64 if an input is). For non-negative features at most 2 / B per layer, which is
        why the paper weights it with 3000. B = 1 and an empty batch give 0; an all-zero student row gets no gradient
        from its own normalisation.

    In data-parallel training each process sees the similarities of its own batch alone: B = 256 over 8 processes is a
    loss 6.6 times larger, with a gradient that points elsewhere (cosine 0.79), than one process would have.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that cannot be meant, with both shapes.

    Source: arXiv 1907.09682, eq. 2-4; values equal RepDistiller's ``Similarity``.
    """
    check_choice("reduction", reduction, SP_REDUCTIONS)
    students, teachers = layer_pairs(student, teacher, "sp_loss")
    batch = students[0].shape[0]
    scale = 1 / max(batch, 1) ** 2 if reduction == "batchmean" else 1.0
    return sp_gram(students, teachers, row_norm=row_norm, scale=scale, eps=eps)


class SPLoss(nn.Module):
    """``sp_loss`` with its options as a module: ``SPLoss()(student_features, teacher_features)``."""

    def __init__(self, row_norm: str = "l2", reduction: str = "batchmean", eps: float = 1e-12) -> None:
        super().__init__()
        check_choice("row_norm", row_norm, ROW_NORMS)
        check_choice("reduction", reduction, SP_REDUCTIONS)
        check_positive("eps", eps)
        self.row_norm, self.reduction, self.eps = row_norm, reduction, eps

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        return sp_loss(student, teacher, row_norm=self.row_norm, reduction=self.reduction, eps=self.eps)

    def extra_repr(self) -> str:
        return f"row_norm={self.row_norm!r}, reduction={self.reduction!r}"
