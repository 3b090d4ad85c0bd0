"""Device functions of softmax_kl: the divergences but the forward KL, and the gradient of the terms with a teacher.

Formulas and notation as in reference_divergences.py and triton_device.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import log1p
from .triton_device import NEG_INF, is_non_target, kl_term, scaled, weighted
from .triton_ratio import Share, difference, expm1, finite, log_ratio, parted, target_shares


@triton.jit
def _mixture(d, teacher_share, student_share):
    """log(p / m), log(q / m) and (q - p) / m of m = teacher_share p + student_share q, from d = log(p / q)."""
    teacher = d > 0  # which of the two is larger
    x = -tl.abs(d)
    e = -expm1(x)
    smaller = tl.where(teacher, student_share, teacher_share)
    y = smaller * e
    near = y < 0.5
    m = tl.where(near, 1.0 - y, tl.where(teacher, teacher_share, student_share) + smaller * tl.exp(x))
    log = -tl.where(near, log1p(-tl.where(near, y, 0.0)), tl.log(m))
    return tl.where(teacher, log, log + d), tl.where(teacher, log - d, log), tl.where(teacher, -e, e) / m


@triton.jit
def _mixture_slope(x, log_q, ratio, HAS: tl.constexpr):
    if HAS.divergence == "jsd":
        return x.student_share * log_q
    elif HAS.divergence == "skew":
        return x.student_share * x.student_share * ratio
    else:
        return log_q - x.teacher_share * x.student_share * ratio


@triton.jit
def divergence(x, p, q, d, HAS: tl.constexpr):
    """[R, K] whose sums are the divergence and the mean of its slopes."""
    if HAS.divergence == "reverse":
        return kl_term(-d, p, q), weighted(q, -d)
    log_p, log_q, ratio = _mixture(d, x.teacher_share, x.student_share)
    m = x.teacher_share * p + x.student_share * q
    if HAS.divergence == "jsd":
        value = x.teacher_share * kl_term(log_p, m, p) + x.student_share * kl_term(log_q, m, q)
    elif HAS.divergence == "skew":
        value = kl_term(log_p, m, p)
    else:
        value = kl_term(log_q, m, q)
    return value, weighted(q, _mixture_slope(x, log_q, ratio, HAS))


@triton.jit
def _slope(x, d, HAS: tl.constexpr):
    if HAS.divergence == "reverse":
        return -d
    _, log_q, ratio = _mixture(d, x.teacher_share, x.student_share)
    return _mixture_slope(x, log_q, ratio, HAS)


@triton.jit
def soft_gradient(x, y, s, t, of_s, of_t, saved, cols, target, HAS: tl.constexpr):
    """[R, K] the gradient of the terms with a teacher by the student's logits, or by the standardised ones. target:
    what target_gradient gave, [R] each."""
    result = tl.zeros(s.shape, tl.float32)
    over_s = scaled(s - of_s.top[:, None], of_s.inverse_std, x, HAS) - of_s.logz[:, None]
    over_t = scaled(t - of_t.top[:, None], of_t.inverse_std, x, HAS) - of_t.logz[:, None]
    d = log_ratio(x, s, t, of_s.top, of_t.top, of_s, of_t, saved.ratio, HAS)
    shown = (saved.ratio * 0.0)[:, None]  # NaN of a row shows in classes that have no probability too
    if HAS.divergence == "forward":
        if HAS.kl:
            difference_of_q, _ = parted(over_s, over_t, d)
            result += (x.terms.kl * x.inverse_t) * (difference_of_q + shown)
        if HAS.decoupled:
            result += x.inverse_t * (_decoupled(x, y, s, t, of_s, of_t, saved, cols, target, HAS) + shown)
    elif HAS.kl:
        h = _slope(x, d, HAS)
        by_slope = weighted(tl.exp(over_s), h - saved.slope[:, None])
        result += (x.terms.kl * x.inverse_t) * (by_slope + shown)
    return result


@triton.jit
def target_gradient(x, rows, y, of_s, of_t, saved, HAS: tl.constexpr):
    """[R] each, of q_s - q_t: of label a, of label b, of the others' mass."""
    a, b, others = target_shares(x, rows, y, of_s, of_t, saved, HAS)
    return Share(difference(a), difference(b), difference(others))


@triton.jit
def _decoupled(x, y, s, t, of_s, of_t, saved, cols, target, HAS: tl.constexpr):
    """[R, K] T times the gradient of w_target TCKD + w_non_target NCKD."""
    non_target = is_non_target(cols, y)
    log_s = scaled(s - of_s.non_target_top[:, None], of_s.inverse_std, x, HAS) - finite(of_s.non_target_logz)[:, None]
    log_t = scaled(t - of_t.non_target_top[:, None], of_t.inverse_std, x, HAS) - finite(of_t.non_target_logz)[:, None]
    empty = (of_s.non_target_logz == NEG_INF) | (of_t.non_target_logz == NEG_INF)
    ratio = tl.where(empty, 0.0, saved.non_target_ratio)
    d = log_ratio(x, s, t, of_s.non_target_top, of_t.non_target_top, of_s, of_t, ratio, HAS)
    of_q, q_s = parted(log_s, log_t, d)
    others = x.terms.non_target_kl * of_q + (x.terms.target_kl * target.d)[:, None] * q_s
    labels = tl.where(cols[None, :] == y.a[:, None], target.s[:, None], target.t[:, None])
    return tl.where(non_target, others, x.terms.target_kl * labels)
