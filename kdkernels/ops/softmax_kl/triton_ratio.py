"""Device functions of softmax_kl: what is made from d = log(q_t / q_s), so that nothing cancels where the networks are
close. Notation as in triton_device.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_common import log1p
from .triton_device import NEG_INF, kl_term, load_at, scaled


class Share(NamedTuple):
    """[R] each: a probability of both networks, and d."""

    s: Any
    t: Any
    d: Any


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, -1 for NaN."""
    x = tl.where(x > -87.0, x, -87.0)
    series = 1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))))
    return tl.where(x > -0.35, x * (1.0 + x * 0.5 * (1.0 + x * (1 / 3) * series)), tl.exp(x) - 1.0)


@triton.jit
def apart(x, top_s, top_t, inverse_std_s, inverse_std_t, HAS: tl.constexpr):
    """[R] how far apart the networks' maxima are, over T; of standardised logits as if they were far."""
    if HAS.standardize:
        return tl.zeros(top_s.shape, tl.float32) + 2.0
    return (top_t - top_s) * x.inverse_t


@triton.jit
def log_ratio(x, s, t, top_s, top_t, of_s, of_t, ratio, HAS: tl.constexpr):
    """[R, K] d of logits that are counted from these maxima, less `ratio`. Where the maxima are near, the logits are
    subtracted from each other first, which rounds nothing where the networks are close."""
    between = apart(x, top_s, top_t, of_s.inverse_std, of_t.inverse_std, HAS)
    over_s = scaled(s - top_s[:, None], of_s.inverse_std, x, HAS)
    over_t = scaled(t - top_t[:, None], of_t.inverse_std, x, HAS)
    near = (tl.abs(between) < 1.0)[:, None]
    return tl.where(near, (t - s) * x.inverse_t - (between + ratio)[:, None], over_t - over_s - ratio[:, None])


@triton.jit
def corrected(ratio, value, mean):
    """[R] log(Z_t / Z_s) from a rounded one, with which the KL is `value` and the mean of d under q_t `mean`, and the
    KL itself: Z_s / Z_t is too large by 1 + value - mean."""
    u = value - mean
    small = tl.abs(u) < 0.1
    u = tl.where(small, u, 0.0)
    return ratio - log1p(u), value - 0.5 * u * u


@triton.jit
def ratio_of(total_s, total_t):
    """[R] log(Z_t / Z_s). The logarithm of an empty sum counts as 0 beside another."""
    empty = (total_s == 0) | (total_t == 0)
    quotient = tl.where(empty, total_t, total_t / tl.where(total_s == 0, 1.0, total_s))
    return tl.where(quotient == 0, NEG_INF, tl.log(tl.where(quotient == 0, 1.0, quotient)))


@triton.jit
def finite(log):
    """A logarithm, 0 for that of nothing."""
    return tl.where(log == NEG_INF, 0.0, log)


@triton.jit
def parted(log_s, log_t, d):
    """q_s - q_t and q_s: the larger one times 1 - exp(-|d|)."""
    larger = tl.exp(tl.maximum(log_s, log_t))
    lost = larger * expm1(-tl.abs(d))
    return tl.where(d > 0, lost, -lost), tl.where(d > 0, larger + lost, larger)


@triton.jit
def _share(x, rows, k, of_s, of_t, ratio, HAS: tl.constexpr):
    s, t = load_at(x.student, rows, k), load_at(x.teacher, rows, k)
    log_s = scaled(s - of_s.top, of_s.inverse_std, x, HAS) - of_s.logz
    log_t = scaled(t - of_t.top, of_t.inverse_std, x, HAS) - of_t.logz
    between = apart(x, of_s.top, of_t.top, of_s.inverse_std, of_t.inverse_std, HAS)
    far = log_t + of_t.logz - log_s - of_s.logz - ratio
    d = tl.where(tl.abs(between) < 1.0, (t - s) * x.inverse_t - (between + ratio), far)
    return Share(tl.exp(log_s), tl.exp(log_t), d)


@triton.jit
def difference(share):
    """[R] q_s - q_t."""
    lost = tl.maximum(share.s, share.t) * expm1(-tl.abs(share.d))
    return tl.where(share.d > 0, lost, -lost)


@triton.jit
def target_shares(x, rows, y, of_s, of_t, saved, HAS: tl.constexpr):
    """What the target term compares: the labels' probabilities, that of b being 0 where it is a, and the others' mass:
    from the labels' where that is less, else from their own log-sum."""
    a = _share(x, rows, y.a, of_s, of_t, saved.ratio, HAS)
    b = _share(x, rows, y.b, of_s, of_t, saved.ratio, HAS)
    one = y.a == y.b
    b = Share(tl.where(one, 0.0, b.s), tl.where(one, 0.0, b.t), tl.where(one, 0.0, b.d))
    mass_s, mass_t = a.s + b.s, a.t + b.t
    little = (mass_s < 0.5) & (mass_t < 0.5)
    more = tl.where(little, difference(a) + difference(b), 0.0)
    rest = tl.where(little, 1.0 - mass_s, 1.0)
    top_s = scaled(of_s.non_target_top - of_s.top, of_s.inverse_std, x, HAS)
    top_t = scaled(of_t.non_target_top - of_t.top, of_t.inverse_std, x, HAS)
    log_s = top_s + of_s.non_target_logz - of_s.logz
    log_t = top_t + of_t.non_target_logz - of_t.logz
    between = (of_t.non_target_top - of_s.non_target_top) - (of_t.top - of_s.top)
    near = tl.abs(apart(x, of_s.top, of_t.top, of_s.inverse_std, of_t.inverse_std, HAS)) < 1.0
    between = tl.where(near, between * x.inverse_t, top_t - top_s)
    empty = (log_s == NEG_INF) | (log_t == NEG_INF)
    d = tl.where(empty, log_t - log_s, between + saved.non_target_ratio - saved.ratio)
    d = tl.where(little, log1p(more / rest), d)
    others = Share(tl.where(little, rest, tl.exp(log_s)), tl.where(little, 1.0 - mass_t, tl.exp(log_t)), d)
    return a, b, others


@triton.jit
def target_kl(x, rows, y, of_s, of_t, saved, HAS: tl.constexpr):
    """[R] TCKD: sum over the labels of q_t log(q_t / q_s), plus S_t log(S_t / S_s)."""
    a, b, others = target_shares(x, rows, y, of_s, of_t, saved, HAS)
    return kl_term(a.d, a.s, a.t) + kl_term(b.d, b.s, b.t) + kl_term(others.d, others.s, others.t)
