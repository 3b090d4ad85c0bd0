"""softmax_pearson in plain PyTorch: the fallback. What it computes is in definition.py.

a and b are the student's and the teacher's centred probabilities, d = b - a. Where the two are close to each other
their difference keeps the digits: |a|^2 |b|^2 - <a, b>^2 = |a|^2 |d|^2 - <a, d>^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import CorrelatedRows


def supports(*tensors: Tensor) -> str | None:
    return None


def _correlation(a: Tensor, b: Tensor, d: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """1 - r, and the factors (3, ...) in dr/da = f0 (b - f2 a) + f1 a, f2 being 1 where the two are close."""
    aa, ab, bb, ad, dd = ((x * y).sum(dim) for x, y in ((a, a), (a, b), (b, b), (a, d), (d, d)))
    norm_a, norm_b = aa.sqrt(), bb.sqrt()
    norms = norm_a * norm_b
    near = (4 * dd < aa) & (norms > 0)  # b may be 0: what is far below it is lost in d
    total = norms + eps
    gap = torch.where(near, (aa * dd - ad * ad).clamp(min=0) / (norms + ab), norms - ab)
    along = torch.where(norm_a == 0, 0, torch.where(near, ad, ab) / norm_a)
    on_a = (torch.where(near, eps, 0) - norm_b * along) / total / total
    return (gap + eps) / total, torch.stack([1 / total, on_a, near.to(a.dtype)])


def forward(x: CorrelatedRows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.student, x.teacher)
    rows, classes = x.student.shape
    a, b = ((z.to(dtype) / x.temperature).softmax(1) for z in (x.student, x.teacher))
    if rows == 0:
        return a.sum(), a, b, a.new_empty(3, 0), a.new_zeros(5, classes)
    d, scale = b - a, x.temperature**2
    of_rows, row_factors = _correlation(a - 1 / classes, b - 1 / classes, d, 1, x.eps)
    mean_a, mean_b, mean_d = (z[0] + (z - z[0]).mean(0) for z in (a, b, d))  # of a constant column exactly its number
    of_columns, column_factors = _correlation(a - mean_a, b - mean_b, d - mean_d, 0, x.eps)
    loss = scale * (x.beta * of_rows.mean() + x.gamma * of_columns.mean())
    row_factors[:2] *= -scale * x.beta / rows
    column_factors[:2] *= -scale * x.gamma / classes
    means = torch.stack([torch.where(column_factors[2] == 1, mean_d, mean_b), mean_a])
    return loss, a, b, row_factors, torch.cat([column_factors, means])


def backward(
    grad: Tensor,
    p_s: Tensor,
    p_t: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    student: Tensor,
    temperature: float,
) -> Tensor:
    row_b, row_a, row_near = row_factors[:, :, None]
    on_b, on_a, near, mean_b, mean_a = column_factors
    mean = 1 / p_s.shape[1]
    g = row_b * (p_t - row_near * p_s - (1 - row_near) * mean) + row_a * (p_s - mean)
    g += on_b * (p_t - near * p_s - mean_b) + on_a * (p_s - mean_a)
    along = (p_s * g).sum(1, keepdim=True)
    return (p_s * (g - along) * (grad / temperature)).to(student.dtype)
