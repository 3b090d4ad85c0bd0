"""multi_level in plain PyTorch: the fallback. What it computes is in definition.py, how in op.py."""

from __future__ import annotations

from torch import Tensor

from ..checks import compute_dtype
from ..softmax_kl.reference_common import difference as difference_of
from ..softmax_kl.reference_common import forward_kl
from .op import Factor


def supports(*tensors: Tensor) -> str | None:
    return None


def level(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    z_s, z_t = ((z.to(dtype) - z.amax(1, keepdim=True)) / temperature for z in (student, teacher))
    q_s, q_t = z_s.softmax(1), z_t.softmax(1)
    kl, log_ratio = forward_kl(z_s, -q_s.amax(1, keepdim=True).log(), z_t)
    d = -difference_of(q_s, q_t, z_t.sub_(z_s).sub_(log_ratio))
    return q_s, d, q_s + d / 2, kl.sum()


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
