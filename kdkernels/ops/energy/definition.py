"""energy as on a board: differentiable PyTorch, the oracle of the tests.

m = (1 / C) sum_c |A[c]|^p;   u = m / max(||m||_2, 1e-12)        per sample, over the pixels
L = mean over the pixels of (u_s - u_t)^2, or of |u_s - u_t|
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import UNIT_EPS, Activation, AttentionPairs


def energy(x: Activation) -> Tensor:
    m = x.activation.to(compute_dtype(x.activation)).abs().pow(x.power).sum(1) / max(x.activation.shape[1], 1)
    if x.normalize:
        m = m / torch.linalg.vector_norm(m, dim=(1, 2), keepdim=True).clamp(min=UNIT_EPS)
    return m


def attention(x: AttentionPairs) -> Tensor:
    dtype = compute_dtype(*x.student, *x.teacher)
    values = []
    for student, teacher, factor in zip(x.student, x.teacher, x.factors(), strict=True):
        u_s, u_t = (energy(Activation(a.to(dtype), x.power, True)) for a in (student, teacher.detach()))
        d = u_s - u_t
        pixels = max(d.shape[1] * d.shape[2], 1)
        values.append(factor * (d.abs() if x.absolute else d.square()).sum((1, 2)) / pixels)
    loss = torch.stack(values)  # (L, B)
    loss = loss if x.per_sample else loss.sum(1)
    return loss if x.per_layer else loss.sum(0)
