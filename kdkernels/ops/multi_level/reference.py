"""multi_level in plain PyTorch: the fallback. What it computes is in definition.py, how in op.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import Factor


def supports(*tensors: Tensor) -> str | None:
    return None


def level(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    log_s, log_t = ((z.to(dtype) / temperature).log_softmax(1) for z in (student, teacher))
    q_s, q_t = log_s.exp(), log_t.exp()
    d = q_t - q_s
    return q_s, d, q_s + d / 2, _divergence(log_t - log_s, q_s, q_t, d)


def _divergence(log_ratio: Tensor, q_s: Tensor, q_t: Tensor, d: Tensor) -> Tensor:
    """The sum of q_t (r + e^-r - 1), r = log(q_t / q_s), which is that of q_t r, but has no negative term."""
    near = log_ratio.abs() < 0.5
    terms = torch.where(near, log_ratio + torch.expm1(-log_ratio), log_ratio) * q_t
    return torch.where(q_t == 0, q_s, terms - torch.where(near, 0, d)).sum()


def add_gradient(
    total: Tensor,
    q_s: Tensor,
    difference: Tensor,
    by_batch: Tensor | None,
    by_class: Tensor | None,
    factors: tuple[Factor, Factor, Factor],
) -> None:
    total += factors[0] * difference
    for factor, g in ((factors[1], by_batch), (factors[2], by_class)):
        if g is not None:
            g = factor * q_s * g
            total += g - q_s * g.sum(1, keepdim=True)
