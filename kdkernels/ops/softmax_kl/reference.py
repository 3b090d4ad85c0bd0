"""softmax_kl in plain PyTorch, made fast: the fallback. What it computes is in definition.py.

Notation: z logits, T temperature, p = softmax(z), q = softmax(z / T), s student, t teacher, {a, b} a row's labels.
Every softmax is kept as (maximum, log of the sum of exponentials above it): adding the two would round away
everything below 1e-7 of the largest logit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from .op import Labels, Rows

NEG_INF = -math.inf


def supports(*tensors: Tensor) -> str | None:
    return None


class RowLabels(NamedTuple):
    """Up to two labels per row, (N, 1) each, with their weights; ``keep`` is False on ignored rows."""

    a: Tensor
    b: Tensor
    weight_a: Tensor
    weight_b: Tensor
    keep: Tensor
    valid: Tensor


def _read(labels: Labels, classes: int, dtype: torch.dtype) -> RowLabels | None:
    """None without labels and with dense ones."""
    if labels.target is None or labels.dense:
        return None
    a, b = labels.target, labels.target if labels.mixed is None else labels.mixed
    keep = (a != labels.ignore_index) & (b != labels.ignore_index)
    valid = (a >= 0) & (a < classes) & (b >= 0) & (b < classes)
    weight_a = torch.ones((), dtype=dtype, device=a.device) if labels.lam is None else labels.lam.to(dtype)
    weight_a = weight_a.expand(a.shape)
    a, b = a.clamp(0, classes - 1), b.clamp(0, classes - 1)
    return RowLabels(a[:, None], b[:, None], weight_a[:, None], 1 - weight_a[:, None], keep[:, None], valid[:, None])


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 means 0 even beside an infinity."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def may_hold(condition: Tensor) -> bool:
    """False if the condition holds nowhere. Only on a CPU is that looked up: elsewhere the host would wait for it."""
    return condition.device.type != "cpu" or bool(condition.any())


class NonTarget(NamedTuple):
    """The softmax over the classes that a row is not labelled with, for one network."""

    z: Tensor  # (N, C) z / T - max, labelled classes at -inf
    max: Tensor  # (N, 1), 0 where no other class has any probability
    logz: Tensor  # (N, 1), -inf there


def _non_target(z: Tensor, z_max: Tensor, labels: RowLabels) -> NonTarget:
    z = z.scatter(1, labels.a, NEG_INF).scatter(1, labels.b, NEG_INF)
    top = z.amax(1, keepdim=True)
    top = torch.where(top == NEG_INF, torch.zeros_like(top), top)  # no other class: its mass is exp(-inf) = 0
    top = top + (z_max - z_max)  # an infinity or NaN among the labelled classes must not hide
    return NonTarget(z, top, (z - top).exp().sum(1, keepdim=True).log())


def _non_target_log_q(z: Tensor, top: Tensor, logz: Tensor) -> Tensor:
    return torch.where(logz == NEG_INF, NEG_INF, z - top - logz)


def _labelled(values: Tensor, labels: RowLabels) -> tuple[Tensor, Tensor]:
    """values at a and at b, b's replaced by 0 where it is a."""
    at_b = values.gather(1, labels.b)
    return values.gather(1, labels.a), torch.where(labels.b == labels.a, torch.zeros_like(at_b), at_b)


def _log_mass(labelled_mass: Tensor, others: NonTarget, logz: Tensor) -> Tensor:
    """log of the other classes' probability: log1p of the labelled mass where that is small, else their log-sum."""
    return torch.where(labelled_mass < 0.5, torch.log1p(-labelled_mass), others.max + others.logz - logz)


def forward(x: Rows, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.student, x.teacher)
    n, classes = x.student.shape
    labels = _read(x.labels, classes, dtype)

    s_max = x.student.amax(1, keepdim=True).to(dtype)
    s = x.student - s_max
    stats = [s_max, *[torch.zeros_like(s_max)] * 4]
    rows = torch.zeros(n, 1, dtype=dtype, device=s.device)
    if x.terms.ce:
        stats[2] = _logz(s)
        rows -= x.terms.ce * _log_likelihood(s, stats[2], x, labels)
    if x.terms.soft:
        stats[1] = x.teacher.amax(1, keepdim=True).to(dtype)
        zs, zt = s.mul_(1 / x.temperature), (x.teacher - stats[1]).mul_(1 / x.temperature)
        stats[3] = _logz(zs)
        kl, stats[4] = _kl(zs, stats[3], zt)
        if x.terms.kl:
            rows += x.terms.kl * kl
        if labels is not None and x.terms.decoupled:
            terms, non_target = _decoupled(zs, zt, stats, x, labels)
            rows += terms
            stats += non_target

    count = torch.full((), max(n, 1), dtype=dtype, device=s.device)
    if labels is not None:
        rows = rows.masked_fill(~labels.valid, math.nan).masked_fill(~labels.keep, 0)
        count = labels.keep.sum().clamp(min=1).to(dtype)
    scale = 1 / count if x.reduction == "mean" else torch.ones_like(count)
    loss = rows[:, 0].clone() if x.reduction == "none" else rows.sum() * scale
    return loss, torch.cat(stats, 1).t().contiguous() if need_grad else loss.new_empty(0), scale


def _log_likelihood(s: Tensor, logz: Tensor, x: Rows, labels: RowLabels | None) -> Tensor:
    """sum_k y_k log p_k, (N, 1), from s = z - max and log Z."""
    if labels is None:
        assert x.labels.target is not None
        result = _weighted(x.labels.target.to(s.dtype), s - logz).sum(1, keepdim=True)
    else:
        result = _weighted(labels.weight_a, s.gather(1, labels.a) - logz)
        if x.labels.mixed is not None:
            result = result + _weighted(labels.weight_b, s.gather(1, labels.b) - logz)
    if e := x.labels.smoothing:
        result = (1 - e) * result + e * (s.mean(1, keepdim=True) - logz)
    return result


def _decoupled(
    zs: Tensor, zt: Tensor, stats: list[Tensor], x: Rows, labels: RowLabels
) -> tuple[Tensor | float, list[Tensor]]:
    """w_target TCKD + w_non_target NCKD, and the statistics of the classes that are not labelled."""
    s_max, t_max, _, logz_s, logz_t = stats
    others_s, others_t = _non_target(zs, s_max, labels), _non_target(zt, t_max, labels)
    rows: Tensor | float = 0.0
    if x.terms.target_kl:
        rows = x.terms.target_kl * _target_kl(zs - logz_s, zt - logz_t, logz_s, logz_t, others_s, others_t, labels)
    if x.terms.non_target_kl:
        rows = rows + x.terms.non_target_kl * _non_target_kl(others_s, others_t)
    return rows, [others_s.max, others_t.max, others_s.logz, others_t.logz]


def _logz(z: Tensor) -> Tensor:
    """log Z of z - max: the largest logit stands for exp(0), so its probability is 1 / Z. exp().sum() is slower."""
    return -z.softmax(1).amax(1, keepdim=True).log_()


def _kl(zs: Tensor, logz_s: Tensor, zt: Tensor) -> tuple[Tensor, Tensor]:
    """sum_k q_t log(q_t / q_s), and log Z_t; a class that the teacher gives no probability adds 0."""
    qt = zt.softmax(1)
    logz_t = -qt.amax(1, keepdim=True).log()
    terms = torch.sub(zt, zs).mul_(qt)
    kl = terms.sum(1, keepdim=True)
    if may_hold(kl.isnan()):  # 0 times the infinity of a class at -inf
        kl = terms.masked_fill_(qt == 0, 0).sum(1, keepdim=True)
    kl = kl + (logz_s - logz_t)
    close = kl < 0.02  # so small a difference of numbers of order ten has lost too many digits
    if may_hold(close):
        delta = torch.sub(zt, zs).sub_(logz_t - logz_s)
        kl = torch.where(close, _bregman(delta, torch.sub(zs, logz_s).exp_(), qt), kl)
    return kl, logz_t


def _bregman(delta: Tensor, qs: Tensor, qt: Tensor) -> Tensor:
    """sum_k of q_t delta - q_t + q_s, delta = log(q_t / q_s): the KL as a sum of terms that are all positive."""
    small = delta.abs() < (0.25 if delta.dtype == torch.float32 else 0.02)
    # delta + expm1(-delta) by its series
    series = 1 / 6 - delta * (1 / 24 - delta * (1 / 120 - delta * (1 / 720 - delta / 5040)))
    terms = torch.where(small, qt * delta.square() * (0.5 - delta * series), qt * (delta - 1) + qs)
    return torch.where(qt == 0, qs, terms).sum(1, keepdim=True)


def _non_target_kl(others_s: NonTarget, others_t: NonTarget) -> Tensor:
    """The KL of the other classes, renormalised; 0 where the teacher has no mass there."""
    log_s, log_t = _non_target_log_q(*others_s), _non_target_log_q(*others_t)
    kl = _bregman(log_t - log_s, log_s.exp(), log_t.exp())
    return kl.masked_fill(others_t.logz == NEG_INF, 0)


def _target_kl(
    log_qs: Tensor,
    log_qt: Tensor,
    logz_s: Tensor,
    logz_t: Tensor,
    others_s: NonTarget,
    others_t: NonTarget,
    labels: RowLabels,
) -> Tensor:
    """sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s) for the mass S of the others."""
    qt = _labelled(log_qt.exp(), labels)
    qs = _labelled(log_qs.exp(), labels)
    log_ss = _log_mass(qs[0] + qs[1], others_s, logz_s)
    log_st = _log_mass(qt[0] + qt[1], others_t, logz_t)
    result = _weighted(log_st.exp(), log_st - log_ss)
    for q, index in zip(qt, (labels.a, labels.b), strict=True):
        result = result + _weighted(q, log_qt.gather(1, index) - log_qs.gather(1, index))
    return result


def backward(grad: Tensor, x: Rows, stats: Tensor, scale: Tensor) -> Tensor:
    dtype = compute_dtype(x.student, x.teacher)
    labels = _read(x.labels, x.student.shape[1], dtype)
    s_max, t_max, _, _, _, *non_target = stats[:, :, None].unbind(0)

    s = x.student - s_max
    result = _ce_gradient(s, x, labels) if x.terms.ce else None
    if x.terms.soft:
        s.mul_(1 / x.temperature)
        t = (x.teacher - t_max).mul_(1 / x.temperature)
        qs, qt = s.softmax(1), t.softmax(1)
        parts = []
        if labels is not None and x.terms.decoupled:
            parts.append((_decoupled_gradient(s, t, qs, qt, non_target, x, labels), 1.0))
        if x.terms.kl:
            parts.append((qs.sub_(qt), x.terms.kl))
        for part, weight in parts:
            alpha = weight / x.temperature
            result = part.mul_(alpha) if result is None else result.add_(part, alpha=alpha)
    if result is None:
        result = torch.zeros_like(s)
    factor = (grad * scale).reshape(-1, 1)  # upstream gradient, one or one per row
    if labels is not None:
        factor = torch.where(labels.valid, factor, math.nan).masked_fill(~labels.keep, 0)
        if may_hold(~labels.keep):
            result.masked_fill_(~labels.keep, 0)  # an ignored row of NaN has zero gradient too
    return result.mul_(factor).to(x.student.dtype).contiguous()


def _ce_gradient(s: Tensor, x: Rows, labels: RowLabels | None) -> Tensor:
    """w_ce (p sum(y) - y), y smoothed."""
    result, e = s.softmax(1), x.labels.smoothing
    if labels is None:
        assert x.labels.target is not None
        y = x.labels.target.to(s.dtype)
        result.mul_((1 - e) * y.sum(1, keepdim=True) + e).sub_(y, alpha=1 - e)
    else:
        result.scatter_add_(1, labels.a, (e - 1) * labels.weight_a)
        if x.labels.mixed is not None:
            result.scatter_add_(1, labels.b, (e - 1) * labels.weight_b)
    if e:
        result -= e / s.shape[1]
    return result.mul_(x.terms.ce)


def _decoupled_gradient(
    s: Tensor, t: Tensor, qs: Tensor, qt: Tensor, non_target: list[Tensor], x: Rows, labels: RowLabels
) -> Tensor:
    """T times d(w_target TCKD + w_non_target NCKD)/dz_s."""
    max_s, max_t, logz_s, logz_t = non_target
    others_s, others_t = _non_target_log_q(s, max_s, logz_s).exp(), _non_target_log_q(t, max_t, logz_t).exp()
    (qs_a, qs_b), (qt_a, qt_b) = _labelled(qs, labels), _labelled(qt, labels)
    mass_s, mass_t = qs_a + qs_b, qt_a + qt_b
    # S_s - S_t from whichever side has the smaller numbers
    others_mass_s, others_mass_t = (
        q.scatter(1, labels.a, 0).scatter(1, labels.b, 0).sum(1, keepdim=True) for q in (qs, qt)
    )
    difference = torch.where(mass_s < 0.5, mass_t - mass_s, others_mass_s - others_mass_t)
    w_target, w_non_target = x.terms.target_kl, x.terms.non_target_kl
    gradient = others_s * (w_target * difference + w_non_target) - w_non_target * others_t
    for index in (labels.a, labels.b):
        gradient.scatter_(1, index, w_target * (qs.gather(1, index) - qt.gather(1, index)))
    return gradient
