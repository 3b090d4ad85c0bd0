"""softmax_pearson in plain PyTorch: the fallback. What it computes is in definition.py.

Sums are of the student's probabilities a and of d = b - a, the difference to the teacher's, so that networks close to
each other keep their digits: <a, b> = |a|^2 + <a, d>, and |a|^2 |b|^2 - <a, b>^2 = |a|^2 |d|^2 - <a, d>^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import CorrelatedRows


def supports(*tensors: Tensor) -> str | None:
    return None


def _correlation(a: Tensor, d: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """1 - r of the centred numbers, and the factors f0, f1 in dr/da = f0 d + f1 a as (2, ...)."""
    aa, ad, dd = a.square().sum(dim), (a * d).sum(dim), d.square().sum(dim)
    ab, norm_a, norm_b = aa + ad, aa.sqrt(), (aa + 2 * ad + dd).clamp(min=0).sqrt()
    norms = norm_a * norm_b
    total = norms + eps
    gap = torch.where(ab > 0, (aa * dd - ad * ad).clamp(min=0) / (norms + ab), norms - ab)
    on_a = torch.where(norm_a == 0, 1 / total, (eps - norm_b * (ad / norm_a)) / total / total)
    return (gap + eps) / total, torch.stack([1 / total, on_a])


def forward(x: CorrelatedRows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.student, x.teacher)
    rows, classes = x.student.shape
    a, b = ((z.to(dtype) / x.temperature).softmax(1) for z in (x.student, x.teacher))
    if rows == 0:
        return a.sum(), a, b, a.new_empty(2, 0), a.new_zeros(4, classes)
    d, scale = b - a, x.temperature**2
    of_rows, row_factors = _correlation(a - 1 / classes, d, 1, x.eps)
    mean_d, mean_a = (z[0] + (z - z[0]).mean(0) for z in (d, a))  # of a constant column exactly its number
    of_columns, column_factors = _correlation(a - mean_a, d - mean_d, 0, x.eps)
    loss = scale * (x.beta * of_rows.mean() + x.gamma * of_columns.mean())
    column_factors = torch.cat([-scale * x.gamma / classes * column_factors, mean_d[None], mean_a[None]])
    return loss, a, b, -scale * x.beta / rows * row_factors, column_factors


def backward(
    grad: Tensor,
    p_s: Tensor,
    p_t: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    student: Tensor,
    temperature: float,
) -> Tensor:
    row_d, row_a = row_factors[:, :, None]
    column_d, column_a, mean_d, mean_a = column_factors
    d = p_t - p_s
    g = row_d * d + row_a * (p_s - 1 / p_s.shape[1]) + column_d * (d - mean_d) + column_a * (p_s - mean_a)
    along = (p_s * g).sum(1, keepdim=True)
    return (p_s * (g - along) * (grad / temperature)).to(student.dtype)
