"""softmax_kl in plain PyTorch: the definition, the fallback and the oracle of the tests.

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

NEG_INF = -math.inf


def supports(*tensors: Tensor) -> str | None:
    return None


class Labels(NamedTuple):
    """Up to two labels per row, (N, 1) each, with their weights; ``keep`` is False on ignored rows."""

    a: Tensor
    b: Tensor
    weight_a: Tensor
    weight_b: Tensor
    keep: Tensor
    valid: Tensor


def read_labels(
    target: Tensor, target_mixed: Tensor | None, lam: Tensor | None, ignore_index: int, classes: int, dtype: torch.dtype
) -> Labels:
    a = target
    b = target if target_mixed is None else target_mixed
    keep = (a != ignore_index) & (b != ignore_index)
    valid = (a >= 0) & (a < classes) & (b >= 0) & (b < classes)
    weight_a = torch.ones((), dtype=dtype, device=a.device) if lam is None else lam.to(dtype)
    weight_a = weight_a.expand(a.shape)
    a, b = a.clamp(0, classes - 1), b.clamp(0, classes - 1)
    return Labels(a[:, None], b[:, None], weight_a[:, None], 1 - weight_a[:, None], keep[:, None], valid[:, None])


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 means 0 even beside an infinity."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def may_hold(condition: Tensor) -> bool:
    """False if the condition holds nowhere. Only on a CPU is that looked up: elsewhere the host would wait for it."""
    return condition.device.type != "cpu" or bool(condition.any())


class Rest(NamedTuple):
    """The softmax over the classes that a row is not labelled with, for one network."""

    z: Tensor  # (N, C) z / T - max, labelled classes at -inf
    max: Tensor  # (N, 1), 0 where no other class has any probability
    logz: Tensor  # (N, 1), -inf there


def _rest(z: Tensor, z_max: Tensor, labels: Labels) -> Rest:
    z = z.scatter(1, labels.a, NEG_INF).scatter(1, labels.b, NEG_INF)
    top = z.amax(1, keepdim=True)
    top = torch.where(top == NEG_INF, torch.zeros_like(top), top)  # no other class: its mass is exp(-inf) = 0
    top = top + (z_max - z_max)  # an infinity or NaN among the labelled classes must not hide
    return Rest(z, top, (z - top).exp().sum(1, keepdim=True).log())


def _rest_log_q(z: Tensor, top: Tensor, logz: Tensor) -> Tensor:
    return torch.where(logz == NEG_INF, NEG_INF, z - top - logz)


def _labelled(values: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """values at a and at b, b's replaced by 0 where it is a."""
    at_b = values.gather(1, labels.b)
    return values.gather(1, labels.a), torch.where(labels.b == labels.a, torch.zeros_like(at_b), at_b)


def _log_rest(mass: Tensor, rest: Rest, logz: Tensor) -> Tensor:
    """log of the other classes' probability: log1p of the labelled mass where that is small, else their log-sum."""
    return torch.where(mass < 0.5, torch.log1p(-mass), rest.max + rest.logz - logz)


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    temperature: float,
    weights: list[float],
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    n, classes = student.shape
    w_ce, w_kl, w_target, w_other = weights
    decoupled = bool(w_target or w_other)

    s_max = student.amax(1, keepdim=True).to(dtype)
    s = student - s_max
    logz_p = logz_s = logz_t = t_max = torch.zeros_like(s_max)
    rows = torch.zeros(n, 1, dtype=dtype, device=student.device)
    dense = target is not None and target.is_floating_point()
    labels = None
    if target is not None and not dense:
        labels = read_labels(target, target_mixed, lam, ignore_index, classes, dtype)
    if w_ce and target is not None:
        logz_p = _logz(s)
        if labels is not None:
            ce = _weighted(labels.weight_a, s.gather(1, labels.a) - logz_p)
            if target_mixed is not None:
                ce = ce + _weighted(labels.weight_b, s.gather(1, labels.b) - logz_p)
        else:
            ce = _weighted(target.to(dtype), s - logz_p).sum(1, keepdim=True)
        rows -= w_ce * ce

    rest_stats: list[Tensor] = []
    if w_kl or decoupled:
        t_max = teacher.amax(1, keepdim=True).to(dtype)
        zs, zt = s.mul_(1 / temperature), (teacher - t_max).mul_(1 / temperature)
        logz_s = _logz(zs)
        kl, logz_t = _kl(zs, logz_s, zt)
        if w_kl:
            rows += w_kl * kl
        if decoupled:
            assert labels is not None
            rest_s, rest_t = _rest(zs, s_max, labels), _rest(zt, t_max, labels)
            if w_target:
                rows += w_target * _target_kl(zs - logz_s, zt - logz_t, logz_s, logz_t, rest_s, rest_t, labels)
            if w_other:
                rows += w_other * _other_kl(rest_s, rest_t)
            rest_stats = [rest_s.max, rest_t.max, rest_s.logz, rest_t.logz]

    count = torch.full((), max(n, 1), dtype=dtype, device=student.device)
    if labels is not None:
        rows = rows.masked_fill(~labels.valid, math.nan).masked_fill(~labels.keep, 0)
        count = labels.keep.sum().clamp(min=1).to(dtype)
    scale = 1 / count if reduction == "batchmean" else torch.ones_like(count)
    loss = rows[:, 0].clone() if reduction == "none" else rows.sum() * scale
    if not need_grad:
        return loss, loss.new_empty(0), scale

    stats = [s_max, t_max, logz_p, logz_s, logz_t, *rest_stats]
    return loss, torch.cat(stats, 1).t().contiguous(), scale


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


def _other_kl(rest_s: Rest, rest_t: Rest) -> Tensor:
    """The KL of the other classes, renormalised; 0 where the teacher has no mass there."""
    log_s, log_t = _rest_log_q(*rest_s), _rest_log_q(*rest_t)
    kl = _bregman(log_t - log_s, log_s.exp(), log_t.exp())
    return kl.masked_fill(rest_t.logz == NEG_INF, 0)


def _target_kl(
    log_qs: Tensor, log_qt: Tensor, logz_s: Tensor, logz_t: Tensor, rest_s: Rest, rest_t: Rest, labels: Labels
) -> Tensor:
    """sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s) for the mass S of the others."""
    qt = _labelled(log_qt.exp(), labels)
    qs = _labelled(log_qs.exp(), labels)
    log_ss = _log_rest(qs[0] + qs[1], rest_s, logz_s)
    log_st = _log_rest(qt[0] + qt[1], rest_t, logz_t)
    result = _weighted(log_st.exp(), log_st - log_ss)
    for q, index in zip(qt, (labels.a, labels.b), strict=True):
        result = result + _weighted(q, log_qt.gather(1, index) - log_qs.gather(1, index))
    return result


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    target_mixed: Tensor | None,
    lam: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    temperature: float,
    weights: list[float],
    ignore_index: int,
) -> Tensor:
    dtype = compute_dtype(student, teacher)
    classes = student.shape[1]
    w_ce, w_kl, w_target, w_other = weights
    s_max, t_max, _, _, _, *rest_stats = stats[:, :, None].unbind(0)
    dense = target is not None and target.is_floating_point()
    labels = None
    if target is not None and not dense:
        labels = read_labels(target, target_mixed, lam, ignore_index, classes, dtype)

    s = student - s_max
    result = None
    if w_ce and target is not None:
        result = s.softmax(1)  # p
        if labels is not None:
            result.scatter_add_(1, labels.a, -labels.weight_a)
            if target_mixed is not None:
                result.scatter_add_(1, labels.b, -labels.weight_b)
        else:
            y = target.to(dtype)
            result.mul_(y.sum(1, keepdim=True)).sub_(y)
        result.mul_(w_ce)
    if w_kl or w_target or w_other:
        s.mul_(1 / temperature)
        t = (teacher - t_max).mul_(1 / temperature)
        qs, qt = s.softmax(1), t.softmax(1)
        parts = []
        if w_target or w_other:
            assert labels is not None
            parts.append((_rest_gradient(s, t, qs, qt, rest_stats, labels, w_target, w_other), 1.0))
        if w_kl:
            parts.append((qs.sub_(qt), w_kl))
        for part, weight in parts:
            alpha = weight / temperature
            result = part.mul_(alpha) if result is None else result.add_(part, alpha=alpha)
    if result is None:
        result = torch.zeros_like(s)
    factor = (grad * scale).reshape(-1, 1)  # upstream gradient, one or one per row
    if labels is not None:
        factor = torch.where(labels.valid, factor, math.nan).masked_fill(~labels.keep, 0)
        if may_hold(~labels.keep):
            result.masked_fill_(~labels.keep, 0)  # an ignored row of NaN has zero gradient too
    return result.mul_(factor).to(student.dtype).contiguous()


def _rest_gradient(
    s: Tensor,
    t: Tensor,
    qs: Tensor,
    qt: Tensor,
    rest_stats: list[Tensor],
    labels: Labels,
    w_target: float,
    w_other: float,
) -> Tensor:
    """T times d(w_target TCKD + w_other NCKD)/dz_s."""
    max_s, max_t, logz_s, logz_t = rest_stats
    other_s, other_t = _rest_log_q(s, max_s, logz_s).exp(), _rest_log_q(t, max_t, logz_t).exp()
    (qs_a, qs_b), (qt_a, qt_b) = _labelled(qs, labels), _labelled(qt, labels)
    mass_s, mass_t = qs_a + qs_b, qt_a + qt_b
    # S_s - S_t from whichever side has the smaller numbers
    rest_mass_s, rest_mass_t = (
        q.scatter(1, labels.a, 0).scatter(1, labels.b, 0).sum(1, keepdim=True) for q in (qs, qt)
    )
    difference = torch.where(mass_s < 0.5, mass_t - mass_s, rest_mass_s - rest_mass_t)
    gradient = other_s * (w_target * difference + w_other) - w_other * other_t
    for index in (labels.a, labels.b):
        gradient.scatter_(1, index, w_target * (qs.gather(1, index) - qt.gather(1, index)))
    return gradient
