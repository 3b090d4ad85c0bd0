"""Knowledge alignment of MLKD (Ding et al., arXiv 2012.00573): the cosine between projected features, row by row.

L = 2 - 2 mean over rows of cos(student, teacher), as the squared distance of the rows' unit vectors: between close rows
2 - 2 cos has no digits left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops.checks import check_reduction, check_rows, compute_dtype
from .ops.gram.op import COSINE_EPS


def alignment_loss(student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
    """2 - 2 cos(student, teacher), averaged over rows.

    Args:
        student: (N, d), already projected to the teacher's width. float16, bfloat16, float32 or float64, any strides.
        teacher: (N, d). No gradient flows to it.
        reduction: "mean" over rows, "sum", or "none" (N,).

    Returns:
        float32 (float64 if an input is), each row between 0 and 4. A row shorter than 1e-8 counts as 1e-8 long, which
        is a constant to the gradient; an empty batch gives 0.

    Raises:
        TypeError, ValueError: invalid dtypes, shapes, devices or options, with both shapes.

    Source: arXiv 2012.00573 (knowledge alignment); the authors' ifding/DLKD.
    """
    check_rows(student, teacher, "alignment_loss", same_width=True)
    reduction = check_reduction(reduction, "alignment_loss", batchmean=True)
    dtype = compute_dtype(student, teacher)
    s, missing_s = _unit(student.to(dtype))
    t, missing_t = _unit(teacher.detach().to(dtype))
    rows = (s - t).square().sum(1) + missing_s + missing_t
    if reduction == "none":
        return rows
    return rows.sum() / (max(student.shape[0], 1) if reduction == "mean" else 1)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, or shorter under the eps, and what their squares lack of 1: 0 unless a row is under it."""
    if x.numel() == 0:
        return x, x.new_ones(x.shape[0])
    top = x.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    norm = torch.linalg.vector_norm(x / top, dim=1, keepdim=True) * top  # squares of large features overflow
    short = norm < COSINE_EPS
    unit = x / norm.where(~short, COSINE_EPS)
    return unit, (1 - unit.square().sum(1)).where(short[:, 0], 0)


class AlignmentLoss(nn.Module):
    """``alignment_loss`` as a module: ``AlignmentLoss()(student_features, teacher_features)``."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = check_reduction(reduction, "AlignmentLoss", batchmean=True)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return alignment_loss(student, teacher, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
