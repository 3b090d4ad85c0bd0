"""softmax_pearson as on a board: differentiable PyTorch, the oracle of the tests. Source: arXiv 2205.10536, eq. 5-8.

q = softmax(z / T);   L = T^2 (beta mean over rows of (1 - r) + gamma mean over columns of (1 - r))
r = <a, b> / (|a| |b| + eps) of the student's row or column a and the teacher's b, each less its mean
"""

from __future__ import annotations

from torch import Tensor

from ..checks import compute_dtype
from .op import CorrelatedRows


def softmax_pearson(x: CorrelatedRows) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    s, t = ((z.to(dtype) / x.temperature).softmax(1) for z in (x.student, x.teacher.detach()))
    if len(s) == 0:
        return s.sum()
    rows, columns = (1 - _pearson(s, t, x.eps)).mean(), (1 - _pearson(s.t(), t.t(), x.eps)).mean()
    return x.temperature**2 * (x.beta * rows + x.gamma * columns)


def _pearson(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Of every row; PyTorch's gradient of a norm is 0 at 0."""
    a, b = (z - z.mean(1, keepdim=True) for z in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)
