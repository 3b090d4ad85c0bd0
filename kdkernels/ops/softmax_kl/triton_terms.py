"""Device functions of softmax_kl's forward pass: the terms of a row's loss, from the statistics of its softmaxes.

Notation as in triton_device.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_device import (
    NEG_INF,
    Saved,
    Softmax,
    is_non_target,
    kl_term,
    load_at,
    load_tile,
    non_target_log_q,
    scaled,
    weighted,
)
from .triton_gradient import divergence
from .triton_ratio import corrected, log_ratio, target_kl


class Terms(NamedTuple):
    """[R, K], whose sums over the classes are what a row has, but for its labels' own terms."""

    value: Any
    slope: Any  # the mean slope
    kl: Any  # the forward KL
    mean: Any  # of d under q_t
    non_target_kl: Any
    non_target_mean: Any


@triton.jit
def chunked_terms(x, y, of_s, of_t, saved, rows, C, HAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """As row_terms, of long rows."""
    zero = tl.zeros([rows.shape[0], BLOCK_C], tl.float32)
    sums = Terms(zero, zero, zero, zero, zero, zero)
    if HAS.soft or (HAS.ce and (HAS.dense or HAS.smooth)):
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN)
            t = s
            if HAS.soft:
                t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
            more = class_terms(x, s, t, of_s, of_t, saved, rows, cols, C, is_non_target(cols, y), HAS, ALIGN)
            sums = Terms(
                sums.value + more.value,
                sums.slope + more.slope,
                sums.kl + more.kl,
                sums.mean + more.mean,
                sums.non_target_kl + more.non_target_kl,
                sums.non_target_mean + more.non_target_mean,
            )
    return row_terms(x, sums, of_s, of_t, saved, HAS)


@triton.jit
def row_terms(x, terms, of_s, of_t, saved, HAS: tl.constexpr):
    """[R] the terms that sum over the classes, and the statistics with all digits of the ratios."""
    result = tl.sum(terms.value, 1)
    ratio, non_target_ratio = saved.ratio, saved.non_target_ratio
    if HAS.soft and HAS.divergence == "forward":
        ratio, value = corrected(ratio, tl.sum(terms.kl, 1), tl.sum(terms.mean, 1))
        if HAS.kl:
            result += x.terms.kl * value
        if HAS.decoupled:
            value, mean = tl.sum(terms.non_target_kl, 1), tl.sum(terms.non_target_mean, 1)
            non_target_ratio, value = corrected(non_target_ratio, value, mean)
            if HAS.non_target:
                result += x.terms.non_target_kl * tl.where(of_t.non_target_logz == NEG_INF, 0.0, value)
    of_t = Softmax(
        of_t.top, of_t.inverse_std, of_t.logz_p, of_s.logz + ratio, of_t.non_target_top, of_t.non_target_logz
    )
    return result, of_t, Saved(ratio, non_target_ratio, tl.sum(terms.slope, 1), saved.mean, saved.lost)


@triton.jit
def class_terms(x, s, t, of_s, of_t, saved, rows, cols, C, non_target, HAS: tl.constexpr, ALIGN: tl.constexpr):
    zero = tl.zeros(s.shape, tl.float32)
    result, slope, value, mean, non_target_value, non_target_mean = zero, zero, zero, zero, zero, zero
    from_top = s - of_s.top[:, None]
    if HAS.ce and HAS.dense:
        y = load_tile(x.labels.target, rows, cols, C, 0.0, ALIGN)
        result -= x.terms.ce * (1.0 - x.labels.smoothing) * weighted(y, from_top - of_s.logz_p[:, None])
    if HAS.ce and HAS.smooth:
        log_p = tl.where((cols < C)[None, :], from_top - of_s.logz_p[:, None], 0.0)
        result -= x.terms.ce * (x.labels.smoothing / C) * log_p
    if HAS.soft:
        q_s = tl.exp(scaled(from_top, of_s.inverse_std, x, HAS) - of_s.logz[:, None])
        q_t = tl.exp(scaled(t - of_t.top[:, None], of_t.inverse_std, x, HAS) - of_t.logz[:, None])
        d = log_ratio(x, s, t, of_s.top, of_t.top, of_s, of_t, saved.ratio, HAS)
        if HAS.divergence == "forward":
            value, mean = kl_term(d, q_s, q_t), weighted(q_t, d)
        else:
            part, slope = divergence(x, q_t, q_s, d, HAS)
            result += x.terms.kl * part
    if HAS.decoupled:
        q_s = tl.exp(non_target_log_q(x, s, of_s, non_target, HAS))
        q_t = tl.exp(non_target_log_q(x, t, of_t, non_target, HAS))
        d = log_ratio(x, s, t, of_s.non_target_top, of_t.non_target_top, of_s, of_t, saved.non_target_ratio, HAS)
        d = tl.where(non_target, d, 0.0)
        non_target_value, non_target_mean = kl_term(d, q_s, q_t), weighted(q_t, d)
    return Terms(result, slope, value, mean, non_target_value, non_target_mean)


@triton.jit
def label_terms(x, y, of_s, of_t, saved, rows, HAS: tl.constexpr):
    """[R] CE and TCKD."""
    result = tl.zeros(rows.shape, tl.float32)
    if HAS.ce:
        log_y = weighted(y.weight_a, load_at(x.student, rows, y.a) - of_s.top - of_s.logz_p)
        if HAS.mixed:
            log_y += weighted(y.weight_b, load_at(x.student, rows, y.b) - of_s.top - of_s.logz_p)
        result -= x.terms.ce * (1.0 - x.labels.smoothing) * log_y
    if HAS.target:
        result += x.terms.target_kl * target_kl(x, rows, y, of_s, of_t, saved, HAS)
    return result
