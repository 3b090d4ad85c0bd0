"""The forward kernels of softmax_kl: one over the rows, and one that sums what its programs left.

A row goes through four steps: its labels, the statistics of its softmaxes, the terms that sum over its classes, and
those of its labels alone. Notation as in triton_device.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..triton_common import aligned
from .triton_device import (
    NEG_INF,
    Softmax,
    is_non_target,
    kl,
    label_log_q,
    load_at,
    load_labels,
    load_tile,
    log_non_target_mass,
    log_sum,
    non_target_log_q,
    online,
    store_stats,
    weighted,
)


class Sums(NamedTuple):
    """[R] each: of one network's rows, or of their chunks so far."""

    top: Any  # the maximum
    total: Any  # sum of exp((z - top) / T)
    non_target_top: Any
    non_target_total: Any


@triton.jit
def rows_kernel(
    x,  # Inputs
    loss,  # [N] for "none", [] for "sum" and "mean", [2, programs] for "partial": sums of rows, and how many count
    stats,  # [5 or 9, N]
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
        result, of_s, of_t = _whole_rows(x, y, rows, C, HAS, ALIGN, BLOCK_C)
    else:
        of_s, of_t = _chunked_softmax(x, y, rows, C, HAS, ALIGN, BLOCK_C)
        result = _chunked_terms(x, y, of_s, of_t, rows, C, HAS, ALIGN, BLOCK_C)
    if HAS.labels:
        result += _label_terms(x, y, of_s, of_t, rows, HAS)
    if HAS.decoupled:
        result += (of_s.logz + of_t.logz) * 0.0  # NaN or inf among the labelled logits must not hide behind the others
    result = tl.where(y.keep, tl.where(y.valid, result, float("nan")), 0.0)
    _store_loss(loss, scale, result, row_index, inside, inside & y.keep, REDUCTION)
    if STATS:
        store_stats(stats, rows, inside, x.N, of_s, of_t, HAS)


@triton.jit
def _whole_rows(x, y, rows, C, HAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
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
    of_s, of_t, t = Softmax(s_top, logz_p, zero, zero, zero), Softmax(zero, zero, zero, zero, zero), s
    if HAS.soft:
        t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
        t_top = tl.max(t, 1)
        t = (t - t_top[:, None]) * x.inverse_t
        of_s = _softmax(_tile_sums(s_top, s * x.inverse_t, non_target, HAS), logz_p)
        of_t = _softmax(_tile_sums(t_top, t, non_target, HAS), zero)
    return _class_terms(x, s, t, of_s, of_t, rows, cols, C, non_target, HAS, ALIGN), of_s, of_t


@triton.jit
def _tile_sums(top, z, non_target, HAS: tl.constexpr):
    """Of rows that lie in one tile; z is relative to their maximum, over T."""
    non_target_top = tl.full(top.shape, NEG_INF, tl.float32)
    non_target_total = tl.zeros(top.shape, tl.float32)
    total = tl.sum(tl.exp(z), 1)
    if HAS.decoupled:
        others = tl.where(non_target, z, NEG_INF)
        non_target_top, non_target_total = online(non_target_top, non_target_total, others, 1.0)
    return Sums(top, total, non_target_top, non_target_total)


@triton.jit
def _softmax(sums, logz_p):
    """The statistics from sums whose non_target_top is relative to the maximum, over T."""
    non_target_top = tl.where(sums.non_target_total == 0, 0.0, sums.non_target_top)  # no such class: S = exp(-inf)
    return Softmax(sums.top, logz_p, log_sum(sums.total), non_target_top, log_sum(sums.non_target_total))


@triton.jit
def _chunked_softmax(x, y, rows, C, HAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """The statistics of long rows, which are read in chunks."""
    zero = tl.zeros(rows.shape, tl.float32)
    none = tl.full(rows.shape, NEG_INF, tl.float32)
    sum_p = zero
    sums_s, sums_t = Sums(none, zero, none, zero), Sums(none, zero, none, zero)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        non_target = is_non_target(cols, y)
        s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN)
        if HAS.ce:
            _, sum_p = online(sums_s.top, sum_p, s, 1.0)
        if HAS.soft:
            t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
            sums_t = _add_chunk(sums_t, t, non_target, x.inverse_t, HAS)
        sums_s = _add_chunk(sums_s, s, non_target, x.inverse_t, HAS)
    logz_p = zero
    if HAS.ce:
        logz_p = log_sum(sum_p)
    of_s, of_t = Softmax(sums_s.top, logz_p, zero, zero, zero), Softmax(zero, zero, zero, zero, zero)
    if HAS.soft:
        of_s = _softmax(_relative(sums_s, x.inverse_t), logz_p)
        of_t = _softmax(_relative(sums_t, x.inverse_t), zero)
    return of_s, of_t


@triton.jit
def _add_chunk(sums, z, non_target, inverse_t, HAS: tl.constexpr):
    top, total = online(sums.top, sums.total, z, inverse_t)
    non_target_top, non_target_total = sums.non_target_top, sums.non_target_total
    if HAS.decoupled:
        others = tl.where(non_target, z, NEG_INF)
        non_target_top, non_target_total = online(non_target_top, non_target_total, others, inverse_t)
    return Sums(top, total, non_target_top, non_target_total)


@triton.jit
def _relative(sums, inverse_t):
    """Chunks have raw maxima; what is kept of the non-target classes is relative to the row's, over T."""
    return Sums(sums.top, sums.total, (sums.non_target_top - sums.top) * inverse_t, sums.non_target_total)


@triton.jit
def _chunked_terms(x, y, of_s, of_t, rows, C, HAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """[R] the terms that sum over the classes, of long rows, which are read a second time."""
    result = tl.zeros(rows.shape, tl.float32)
    if HAS.kl or HAS.non_target or (HAS.ce and (HAS.dense or HAS.smooth)):
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN) - of_s.top[:, None]
            t = s
            if HAS.soft:
                t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
                t = (t - of_t.top[:, None]) * x.inverse_t
            result += _class_terms(x, s, t, of_s, of_t, rows, cols, C, is_non_target(cols, y), HAS, ALIGN)
    return result


@triton.jit
def _class_terms(x, s, t, of_s, of_t, rows, cols, C, non_target, HAS: tl.constexpr, ALIGN: tl.constexpr):
    """[R] a tile's part of the terms that sum over the classes; s is relative to the maximum, t also over T."""
    result = tl.zeros(rows.shape, tl.float32)
    if HAS.ce and HAS.dense:
        y = load_tile(x.labels.target, rows, cols, C, 0.0, ALIGN)
        result -= x.terms.ce * (1.0 - x.labels.smoothing) * tl.sum(weighted(y, s - of_s.logz_p[:, None]), 1)
    if HAS.ce and HAS.smooth:
        log_p = tl.where((cols < C)[None, :], s - of_s.logz_p[:, None], 0.0)
        result -= x.terms.ce * (x.labels.smoothing / C) * tl.sum(log_p, 1)
    if HAS.kl:
        result += x.terms.kl * kl(s * x.inverse_t - of_s.logz[:, None], t - of_t.logz[:, None])
    if HAS.non_target:
        log_qs = non_target_log_q(s * x.inverse_t, of_s, non_target)
        result += x.terms.non_target_kl * kl(log_qs, non_target_log_q(t, of_t, non_target))
    return result


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
        log_qs_a, log_qs_b, mass_s = label_log_q(x.student, rows, of_s, y, x.inverse_t)
        log_qt_a, log_qt_b, mass_t = label_log_q(x.teacher, rows, of_t, y, x.inverse_t)
        log_ss, log_st = log_non_target_mass(mass_s, of_s), log_non_target_mass(mass_t, of_t)
        target = weighted(tl.exp(log_st), log_st - log_ss)
        target += weighted(tl.exp(log_qt_a), log_qt_a - log_qs_a)
        target += tl.where(y.a == y.b, 0.0, weighted(tl.exp(log_qt_b), log_qt_b - log_qs_b))
        result += x.terms.target_kl * target
    return result


@triton.jit
def _store_loss(loss, scale, result, row_index, inside, counts, REDUCTION: tl.constexpr):
    """What this program's rows give, by reduction."""
    pid = tl.program_id(0)
    if REDUCTION == "none":
        tl.store(loss + row_index, result, mask=inside)
        if pid == 0:
            tl.store(scale, 1.0)
    else:
        total = tl.sum(tl.where(inside, result, 0.0), 0)
        count = tl.sum(counts.to(tl.float32), 0)
        if REDUCTION == "partial":
            tl.store(loss + pid, total)
            tl.store(loss + tl.num_programs(0) + pid, count)
        else:
            _store_total(loss, scale, total, count, REDUCTION)


@triton.jit
def _store_total(loss, scale, total, count, REDUCTION: tl.constexpr):
    factor = 1.0
    if REDUCTION == "mean":
        factor = 1.0 / tl.maximum(count, 1.0)
    tl.store(scale, factor)
    tl.store(loss, total * factor)


@triton.jit
def sum_kernel(
    partial,  # [2, P]: sums of rows, and how many rows count
    loss,  # []
    scale,  # []
    P,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    totals = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        at = start + tl.arange(0, BLOCK)
        totals += tl.load(partial + at, mask=at < P, other=0.0)
        counts += tl.load(partial + P + at, mask=at < P, other=0.0)
    _store_total(loss, scale, tl.sum(totals, 0), tl.sum(counts, 0), REDUCTION)
