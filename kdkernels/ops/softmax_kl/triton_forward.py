"""The forward kernel of softmax_kl, over the rows.

A row goes through four steps: its labels, the statistics of its softmaxes, the terms that sum over its classes, and
those of its labels alone. Notation as in triton_device.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_common import aligned
from .triton_device import (
    LOWEST,
    NEG_INF,
    Saved,
    Softmax,
    is_non_target,
    joined,
    kl,
    label_log_q,
    load_at,
    load_labels,
    load_tile,
    log_non_target_mass,
    log_sum,
    non_target_log_q,
    online,
    running,
    scaled,
    store_stats,
    weighted,
)
from .triton_gradient import divergence, soft_gradient
from .triton_reduction import store_loss
from .triton_standard import Spread, along, chunked_spread, lost, moments, spread


class Sums(NamedTuple):
    """[R] each: of one network's rows; [R, K] of their chunks so far, by column."""

    top: Any  # the maximum
    total: Any  # sum of exp((z - top) / T)
    non_target_top: Any
    non_target_total: Any


@triton.jit
def rows_kernel(
    x,  # Inputs
    loss,  # [N] for "none", [] for "sum" and "mean", [2, programs] for "partial": sums of rows, and how many count
    stats,  # [*, N]
    scale,  # []
    C,
    HAS: tl.constexpr,  # Has
    REDUCTION: tl.constexpr,  # "partial" where sum_kernel follows; "sum" and "mean" are of a single program
    STATS: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one chunk
    ALIGN: tl.constexpr,  # divides C and what lies between rows
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = aligned(C, ALIGN)
    row_index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row_index < x.N
    rows = tl.minimum(row_index, x.N - 1).to(tl.int64)
    y = load_labels(x.labels, rows, C, HAS)
    if WHOLE:
        result, of_s, of_t, saved = _whole_rows(x, y, rows, C, HAS, STATS, ALIGN, BLOCK_C)
    else:
        result, of_s, of_t, saved = _long_rows(x, y, rows, C, HAS, STATS, ALIGN, BLOCK_C)
    if HAS.labels:
        result += _label_terms(x, y, of_s, of_t, rows, HAS)
    if HAS.decoupled:
        result += (of_s.logz + of_t.logz) * 0.0  # NaN or inf among the labelled logits must not hide behind the others
    result = tl.where(y.keep, tl.where(y.valid, result, float("nan")), 0.0)
    store_loss(loss, scale, result, row_index, inside, inside & y.keep, REDUCTION)
    if STATS:
        store_stats(stats, rows, inside, x.N, of_s, of_t, saved, HAS)


@triton.jit
def _whole_rows(x, y, rows, C, HAS: tl.constexpr, STATS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """[R] the terms that sum over the classes, and the statistics, of rows that are read once and held."""
    cols = tl.arange(0, BLOCK_C)
    non_target = is_non_target(cols, y)
    zero = tl.zeros(rows.shape, tl.float32)
    logz_p = zero
    s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN)
    s_top = tl.max(s, 1)
    s = s - s_top[:, None]
    if HAS.ce:
        logz_p = log_sum(tl.sum(tl.exp(s), 1))
    of_s, of_t, t = Softmax(s_top, zero, logz_p, zero, zero, zero), Softmax(zero, zero, zero, zero, zero, zero), s
    saved = Saved(zero, zero, zero, zero)
    if HAS.soft:
        t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
        t_top = tl.max(t, 1)
        t = t - t_top[:, None]
        spread_s, spread_t = Spread(zero, zero, zero), Spread(zero, zero, zero)
        if HAS.standardize:
            spread_s, spread_t = spread(moments(s, cols, C, 0), C), spread(moments(t, cols, C, 0), C)
        t = scaled(t, spread_t.inverse, x, HAS)
        over_t = scaled(s, spread_s.inverse, x, HAS)
        sums_s, sums_t = _tile_sums(s_top, over_t, non_target, HAS), _tile_sums(t_top, t, non_target, HAS)
        of_s, of_t, ratio = _softmaxes(sums_s, sums_t, spread_s, spread_t, logz_p)
        saved = Saved(ratio, zero, zero, zero)
        terms, slopes = _class_terms(x, s, t, of_s, of_t, saved, rows, cols, C, non_target, HAS, ALIGN)
        result, slope = tl.sum(terms, 1), tl.sum(slopes, 1)
        saved = Saved(ratio, slope, spread_s.mean * spread_s.inverse, zero)
        if HAS.standardize and STATS:
            inner = along(soft_gradient(x, y, over_t, t, of_s, of_t, saved, rows, cols, HAS), s, of_s, saved)
            saved = Saved(ratio, slope, saved.mean, lost(inner, spread_s, C))
        return result, of_s, of_t, saved
    terms, _ = _class_terms(x, s, t, of_s, of_t, saved, rows, cols, C, non_target, HAS, ALIGN)
    return tl.sum(terms, 1), of_s, of_t, saved


@triton.jit
def _tile_sums(top, z, non_target, HAS: tl.constexpr):
    """Of rows that lie in one tile; z is relative to their maximum, over T."""
    non_target_top = tl.full(top.shape, NEG_INF, tl.float32)
    non_target_total = tl.zeros(top.shape, tl.float32)
    total = tl.sum(tl.exp(z), 1)
    if HAS.decoupled:
        others = tl.where(non_target, z, NEG_INF)
        non_target_top, non_target_total = online(
            non_target_top, non_target_total, others, tl.full(top.shape, 1.0, tl.float32)
        )
    return Sums(top, total, non_target_top, non_target_total)


@triton.jit
def _softmaxes(s, t, spread_s, spread_t, logz_p):
    """Both networks' statistics from sums whose non_target_top is relative to the maximum, over T, and the ratio."""
    ratio = tl.log(t.total / s.total)  # not the difference of two logarithms: it keeps its digits near 0
    of_s = _softmax(s, spread_s, logz_p, log_sum(s.total))
    return of_s, _softmax(t, spread_t, logz_p * 0.0, of_s.logz + ratio), ratio


@triton.jit
def _softmax(sums, spread, logz_p, logz):
    non_target_top = tl.where(sums.non_target_total == 0, 0.0, sums.non_target_top)  # no such class: S = exp(-inf)
    return Softmax(sums.top, spread.inverse, logz_p, logz, non_target_top, log_sum(sums.non_target_total))


@triton.jit
def _long_rows(x, y, rows, C, HAS: tl.constexpr, STATS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """As _whole_rows, of rows that are read in chunks: twice, and three times more where they are standardised."""
    zero = tl.zeros(rows.shape, tl.float32)
    spread_s, spread_t = Spread(zero, zero, zero), Spread(zero, zero, zero)
    if HAS.standardize:
        spread_s = chunked_spread(x.student, rows, C, ALIGN, BLOCK_C)
        spread_t = chunked_spread(x.teacher, rows, C, ALIGN, BLOCK_C)
    of_s, of_t, ratio = _chunked_softmax(x, y, spread_s, spread_t, rows, C, HAS, ALIGN, BLOCK_C)
    saved = Saved(ratio, zero, zero, zero)
    result, slope = _chunked_terms(x, y, of_s, of_t, saved, rows, C, HAS, ALIGN, BLOCK_C)
    saved = Saved(ratio, slope, spread_s.mean * spread_s.inverse, zero)
    if HAS.standardize and STATS:
        inner = zero
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN) - of_s.top[:, None]
            t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN) - of_t.top[:, None]
            over_t, t = scaled(s, of_s.inverse_std, x, HAS), scaled(t, of_t.inverse_std, x, HAS)
            inner += along(soft_gradient(x, y, over_t, t, of_s, of_t, saved, rows, cols, HAS), s, of_s, saved)
        saved = Saved(ratio, slope, saved.mean, lost(inner, spread_s, C))
    return result, of_s, of_t, saved


@triton.jit
def _chunked_softmax(x, y, spread_s, spread_t, rows, C, HAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """The statistics of long rows: each column of the chunks has sums of its own, which are joined once per row."""
    zero = tl.zeros(rows.shape, tl.float32)
    inverse_s, inverse_t = zero + x.inverse_t, zero + x.inverse_t
    if HAS.standardize:
        inverse_s, inverse_t = spread_s.inverse * x.inverse_t, spread_t.inverse * x.inverse_t
    nothing = tl.zeros([rows.shape[0], BLOCK_C], tl.float32)
    sum_p, none = nothing, nothing + LOWEST
    sums_s, sums_t = Sums(none, nothing, none, nothing), Sums(none, nothing, none, nothing)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        non_target = is_non_target(cols, y)
        s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN)
        if HAS.ce:
            _, sum_p = running(sums_s.top, sum_p, s, zero + 1.0)
        if HAS.soft:
            t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
            sums_t = _add_chunk(sums_t, t, non_target, inverse_t, HAS)
        sums_s = _add_chunk(sums_s, s, non_target, inverse_s, HAS)
    logz_p = zero
    if HAS.ce:
        logz_p = log_sum(joined(sums_s.top, sum_p, zero + 1.0)[1])
    of_rows = _join(sums_s, inverse_s, HAS)
    if HAS.soft:
        return _softmaxes(of_rows, _join(sums_t, inverse_t, HAS), spread_s, spread_t, logz_p)
    return Softmax(of_rows.top, zero, logz_p, zero, zero, zero), Softmax(zero, zero, zero, zero, zero, zero), zero


@triton.jit
def _add_chunk(sums, z, non_target, inverse_t, HAS: tl.constexpr):
    top, total = running(sums.top, sums.total, z, inverse_t)
    non_target_top, non_target_total = sums.non_target_top, sums.non_target_total
    if HAS.decoupled:
        others = tl.where(non_target, z, NEG_INF)
        non_target_top, non_target_total = running(non_target_top, non_target_total, others, inverse_t)
    return Sums(top, total, non_target_top, non_target_total)


@triton.jit
def _join(sums, inverse_t, HAS: tl.constexpr):
    """The columns' sums joined. The maximum of the non-target classes is kept relative to the row's, over T."""
    top, total = joined(sums.top, sums.total, inverse_t)
    non_target_top, non_target_total = top, total
    if HAS.decoupled:
        non_target_top, non_target_total = joined(sums.non_target_top, sums.non_target_total, inverse_t)
        non_target_top = (non_target_top - top) * inverse_t
    return Sums(top, total, non_target_top, non_target_total)


@triton.jit
def _chunked_terms(x, y, of_s, of_t, saved, rows, C, HAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """[R] the terms that sum over the classes, and the mean slope, of long rows."""
    result = tl.zeros([rows.shape[0], BLOCK_C], tl.float32)
    slope = result
    if HAS.kl or HAS.non_target or (HAS.ce and (HAS.dense or HAS.smooth)):
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN) - of_s.top[:, None]
            t = s
            if HAS.soft:
                t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
                t = scaled(t - of_t.top[:, None], of_t.inverse_std, x, HAS)
            non_target = is_non_target(cols, y)
            value, more = _class_terms(x, s, t, of_s, of_t, saved, rows, cols, C, non_target, HAS, ALIGN)
            result += value
            slope += more
    return tl.sum(result, 1), tl.sum(slope, 1)


@triton.jit
def _class_terms(x, s, t, of_s, of_t, saved, rows, cols, C, non_target, HAS: tl.constexpr, ALIGN: tl.constexpr):
    """[R, K] whose sums are the terms over the classes, and the mean slope; s is relative to the maximum, t also
    over T."""
    result = tl.zeros(s.shape, tl.float32)
    slope = result
    if HAS.ce and HAS.dense:
        y = load_tile(x.labels.target, rows, cols, C, 0.0, ALIGN)
        result -= x.terms.ce * (1.0 - x.labels.smoothing) * weighted(y, s - of_s.logz_p[:, None])
    if HAS.ce and HAS.smooth:
        log_p = tl.where((cols < C)[None, :], s - of_s.logz_p[:, None], 0.0)
        result -= x.terms.ce * (x.labels.smoothing / C) * log_p
    if HAS.soft:
        s = scaled(s, of_s.inverse_std, x, HAS)
    if HAS.kl:
        log_qs, log_qt = s - of_s.logz[:, None], t - of_t.logz[:, None]
        if HAS.divergence == "forward":
            result += x.terms.kl * kl(log_qs, log_qt)
        else:
            d = (t - s) - saved.ratio[:, None]
            value, slope = divergence(x, tl.exp(log_qt), tl.exp(log_qs), d, HAS.divergence)
            result += x.terms.kl * value
    if HAS.non_target:
        log_qs = non_target_log_q(s, of_s, non_target)
        result += x.terms.non_target_kl * kl(log_qs, non_target_log_q(t, of_t, non_target))
    return result, slope


@triton.jit
def _label_terms(x, y, of_s, of_t, rows, HAS: tl.constexpr):
    """[R] CE, and TCKD: sum over the labels of q_t log(q_t / q_s), plus S_t log(S_t / S_s)."""
    result = tl.zeros(rows.shape, tl.float32)
    if HAS.ce:
        log_y = weighted(y.weight_a, load_at(x.student, rows, y.a) - of_s.top - of_s.logz_p)
        if HAS.mixed:
            log_y += weighted(y.weight_b, load_at(x.student, rows, y.b) - of_s.top - of_s.logz_p)
        result -= x.terms.ce * (1.0 - x.labels.smoothing) * log_y
    if HAS.target:
        log_qs_a, log_qs_b, mass_s = label_log_q(x, x.student, rows, of_s, y, HAS)
        log_qt_a, log_qt_b, mass_t = label_log_q(x, x.teacher, rows, of_t, y, HAS)
        log_ss, log_st = log_non_target_mass(mass_s, of_s), log_non_target_mass(mass_t, of_t)
        target = weighted(tl.exp(log_st), log_st - log_ss)
        target += weighted(tl.exp(log_qt_a), log_qt_a - log_qs_a)
        target += tl.where(y.a == y.b, 0.0, weighted(tl.exp(log_qt_b), log_qt_b - log_qs_b))
        result += x.terms.target_kl * target
    return result
