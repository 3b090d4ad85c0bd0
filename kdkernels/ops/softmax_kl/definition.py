"""softmax_kl as on a board: differentiable PyTorch, the oracle of the tests. Equations: arXiv 2203.08679, eq. 1-7.

row  = w_ce CE + w_kl KL + w_target TCKD + w_non NCKD           z logits, s student, t teacher, T temperature
CE   = -sum_k y_k log p_s,k                                     p = softmax(z)
KL   = sum_k q_t,k log(q_t,k / q_s,k)                           q = softmax(z / T)
TCKD = sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s),  S = the mass of all others
NCKD = the KL of the others, renormalised;   KL = TCKD + S_t NCKD
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import Rows


def softmax_kl(x: Rows) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    s, t = x.student.to(dtype), x.teacher.detach().to(dtype)
    y, labelled, counts = _labels(x, dtype)
    s = s.masked_fill(~counts[:, None], 0)  # whatever an ignored row holds, even NaN, has no part in the gradient
    t = t.masked_fill(~counts[:, None], 0)
    log_q_s, log_q_t = (s / x.temperature).log_softmax(1), (t / x.temperature).log_softmax(1)
    log_m_s, log_m_t = (_masses(log_q, labelled) for log_q in (log_q_s, log_q_t))
    y = (1 - x.labels.smoothing) * y + x.labels.smoothing / y.shape[1]
    rows = -x.terms.ce * _product(y, s.log_softmax(1)).sum(1)
    rows = rows + x.terms.kl * _kl(log_q_t, log_q_s)
    rows = rows + x.terms.target_kl * _kl(log_m_t, log_m_s)
    rows = rows + x.terms.non_target_kl * _kl(_others(log_q_t, labelled), _others(log_q_s, labelled))
    rows = rows.masked_fill(~counts, 0)
    if x.reduction == "none":
        return rows
    return rows.sum() / (counts.sum().clamp(min=1) if x.reduction == "mean" else 1)


def _labels(x: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C), which classes are labelled (N, C), and which rows count (N,)."""
    target, mixed, lam, ignore_index, _ = x.labels
    everything = torch.ones(len(x.student), dtype=torch.bool, device=x.student.device)
    nothing = torch.zeros_like(x.student, dtype=dtype)
    if target is None or target.is_floating_point():
        return nothing if target is None else target.to(dtype), nothing.bool(), everything
    if mixed is None or lam is None:
        mixed, lam = target, torch.ones((), dtype=dtype, device=target.device)
    counts = (target != ignore_index) & (mixed != ignore_index)
    a, b = (nothing.scatter(1, label.where(counts, 0)[:, None], 1) for label in (target, mixed))
    lam = lam.to(dtype).expand(len(target))[:, None]
    return lam * a + (1 - lam) * b, (a + b) > 0, counts


def _masses(log_q: Tensor, labelled: Tensor) -> Tensor:
    """log of the labelled classes' probabilities, and of the mass of all others in one more column."""
    others = log_q.masked_fill(labelled, -math.inf)
    return torch.cat([log_q.masked_fill(~labelled, -math.inf), others.logsumexp(1, keepdim=True)], 1)


def _others(log_q: Tensor, labelled: Tensor) -> Tensor:
    """log of the others' probabilities, renormalised; all of them 0 where every class is labelled."""
    none = labelled.all(1, keepdim=True)
    return log_q.masked_fill(labelled & ~none, -math.inf).log_softmax(1).masked_fill(none, 0)


def _product(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, and 0 where the weight is 0, even beside an infinity."""
    return weight * value.masked_fill(weight == 0, 0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_k p log(p / q) of the constant p; a class without probability in p adds nothing."""
    p = log_p.exp()
    return (_product(p, log_p) - _product(p, log_q)).sum(1)
