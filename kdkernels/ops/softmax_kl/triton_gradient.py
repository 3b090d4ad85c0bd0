"""Device functions of softmax_kl: the divergences but the forward KL, and the gradient of the terms with a teacher.

Formulas and notation as in reference_divergences.py and triton_device.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import log1p
from .triton_device import is_non_target, kl_term, label_log_q, non_target_log_q, weighted


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0."""
    series = 1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))))
    return tl.where(x > -0.35, x * (1.0 + x * 0.5 * (1.0 + x * (1 / 3) * series)), tl.exp(x) - 1.0)


@triton.jit
def _mixture(d, teacher_share, student_share):
    """log(p / m), log(q / m) and (q - p) / m of m = teacher_share p + student_share q, from d = log(p / q)."""
    teacher = d > 0  # which of the two is larger
    x = -tl.abs(d)
    e = -_expm1(x)
    smaller = tl.where(teacher, student_share, teacher_share)
    y = smaller * e
    near = y < 0.5
    m = tl.where(near, 1.0 - y, tl.where(teacher, teacher_share, student_share) + smaller * tl.exp(x))
    log = -tl.where(near, log1p(-tl.where(near, y, 0.0)), tl.log(m))
    return tl.where(teacher, log, log + d), tl.where(teacher, log - d, log), tl.where(teacher, -e, e) / m


@triton.jit
def _mixture_slope(x, log_q, ratio, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "jsd":
        return x.student_share * log_q
    elif DIVERGENCE == "skew":
        return x.student_share * x.student_share * ratio
    else:
        return log_q - x.teacher_share * x.student_share * ratio


@triton.jit
def divergence(x, p, q, d, DIVERGENCE: tl.constexpr):
    """[R, K] whose sums are the divergence and the mean of its slopes."""
    if DIVERGENCE == "reverse":
        return kl_term(-d, p, q), weighted(q, -d)
    log_p, log_q, ratio = _mixture(d, x.teacher_share, x.student_share)
    m = x.teacher_share * p + x.student_share * q
    if DIVERGENCE == "jsd":
        value = x.teacher_share * kl_term(log_p, m, p) + x.student_share * kl_term(log_q, m, q)
    elif DIVERGENCE == "skew":
        value = kl_term(log_p, m, p)
    else:
        value = kl_term(log_q, m, q)
    return value, weighted(q, _mixture_slope(x, log_q, ratio, DIVERGENCE))


@triton.jit
def _slope(x, d, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "reverse":
        return -d
    _, log_q, ratio = _mixture(d, x.teacher_share, x.student_share)
    return _mixture_slope(x, log_q, ratio, DIVERGENCE)


@triton.jit
def soft_gradient(x, y, s, t, of_s, of_t, saved, rows, cols, HAS: tl.constexpr):
    """[R, K] the gradient of the terms with a teacher by the student's logits, or by the standardised ones; s and t are
    relative to the maximum, over T."""
    result = tl.zeros(s.shape, tl.float32)
    scale = tl.exp(-of_s.logz)[:, None]
    if HAS.divergence == "forward":
        difference = (tl.exp(s) - tl.exp(t) * tl.exp(-saved.ratio)[:, None]) * scale  # q_s - q_t
        if HAS.decoupled:
            result += x.inverse_t * _decoupled(x, y, s, t, difference, of_s, of_t, rows, cols, HAS)
        if HAS.kl:
            result += (x.terms.kl * x.inverse_t) * difference
    elif HAS.kl:
        h = _slope(x, (t - s) - saved.ratio[:, None], HAS.divergence)
        result += (x.terms.kl * x.inverse_t) * weighted(tl.exp(s) * scale, h - saved.slope[:, None])
    return result


@triton.jit
def _decoupled(x, y, s, t, difference, of_s, of_t, rows, cols, HAS: tl.constexpr):
    """[R, K] T times the gradient of w_target TCKD + w_non_target NCKD; s and t are relative to the maximum, over T."""
    non_target = is_non_target(cols, y)
    q_s = tl.exp(non_target_log_q(s, of_s, non_target))
    q_t = tl.exp(non_target_log_q(t, of_t, non_target))
    _, _, mass_s = label_log_q(x, x.student, rows, of_s, y, HAS)
    _, _, mass_t = label_log_q(x, x.teacher, rows, of_t, y, HAS)
    non_target_s = tl.exp(of_s.non_target_top + of_s.non_target_logz - of_s.logz)
    non_target_t = tl.exp(of_t.non_target_top + of_t.non_target_logz - of_t.logz)
    # S_s - S_t is taken between the labels' masses or between the others', whichever is less
    mass_difference = tl.where(mass_s < 0.5, mass_t - mass_s, non_target_s - non_target_t)
    factor = x.terms.target_kl * mass_difference + x.terms.non_target_kl
    return tl.where(non_target, q_s * factor[:, None] - x.terms.non_target_kl * q_t, x.terms.target_kl * difference)
