"""softmax_kl as on a board: differentiable PyTorch, the oracle of the tests. Equations: arXiv 2203.08679, eq. 1-7.

row  = w_ce CE + w_kl D + w_target TCKD + w_non NCKD            z logits, s student, t teacher, T temperature
CE   = -sum_k y_k log p_s,k                                     p = softmax(z)
D    = KL(q_t || q_s), or what log_divergence says              q = softmax(z / T),  KL(p || q) = sum p log(p / q)
TCKD = sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s),  S = the mass of all others
NCKD = the KL of the others, renormalised;   KL(q_t || q_s) = TCKD + S_t NCKD
standardize: q = softmax(z' / T),  z' = (z - mean) / (std + 1e-7) of each row
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import STANDARD_EPS, Rows


def softmax_kl(x: Rows) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    s, t = x.student.to(dtype), x.teacher.detach().to(dtype)
    y, labelled, counts = _labels(x, dtype)
    s = s.masked_fill(~counts[:, None], 0)  # whatever an ignored row holds, even NaN, has no part in the gradient
    t = t.masked_fill(~counts[:, None], 0)
    soft = (_standardized(z) if x.standardize else z for z in (s, t))
    log_q_s, log_q_t = ((z / x.temperature).log_softmax(1) for z in soft)
    y = (1 - x.labels.smoothing) * y + x.labels.smoothing / y.shape[1]
    rows = -x.terms.ce * _product(y, s.log_softmax(1)).sum(1)
    rows = rows + x.terms.kl * log_divergence(x.divergence, x.beta, log_q_t, log_q_s)
    if x.terms.decoupled:
        rows = rows + x.terms.target_kl * _kl(_masses(log_q_t, labelled), _masses(log_q_s, labelled))
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


def _standardized(z: Tensor) -> Tensor:
    """Mean 0 and unbiased standard deviation 1; a row of one class, like any without spread, gives zeros."""
    std = z.std(1, keepdim=True) if z.shape[1] > 1 else z * 0
    return (z - z.mean(1, keepdim=True)) / (std + STANDARD_EPS)


def log_divergence(kind: str, beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of the teacher p and the student q."""
    if kind == "reverse":
        return _kl(log_q, log_p)
    if kind == "jsd":
        log_m = _log_mixture(beta, log_p, log_q)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if kind == "skew":
        return _kl(log_p, _log_mixture(beta, log_p, log_q))
    if kind == "skew_reverse":
        return _kl(log_q, _log_mixture(1 - beta, log_p, log_q))
    return _kl(log_p, log_q)


def _log_mixture(weight: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """log of weight p + (1 - weight) q, 0 for a class that neither network gives any probability."""
    mixture = weight * log_p.exp() + (1 - weight) * log_q.exp()
    return mixture.masked_fill(mixture == 0, 1).log()


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
    """sum_k p log(p / q); a class without probability in p adds nothing."""
    p = log_p.exp()
    return (_product(p, log_p) - _product(p, log_q)).sum(1)
