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
    load_labels,
    load_tile,
    log_sum,
    running,
    scaled,
    store_stats,
)
from .triton_gradient import soft_gradient, target_gradient
from .triton_ratio import Share, ratio_of
from .triton_reduction import store_loss
from .triton_standard import Spread, along, chunked_spread, lost, moments, spread
from .triton_terms import chunked_terms, class_terms, label_terms, row_terms


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
        result += label_terms(x, y, of_s, of_t, saved, rows, HAS)
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
    if HAS.ce:
        logz_p = log_sum(tl.sum(tl.exp(s - s_top[:, None]), 1))
    of_s, of_t, t = Softmax(s_top, zero, logz_p, zero, zero, zero), Softmax(zero, zero, zero, zero, zero, zero), s
    saved = Saved(zero, zero, zero, zero, zero)
    if HAS.soft:
        t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
        t_top = tl.max(t, 1)
        spread_s, spread_t = Spread(zero, zero, zero), Spread(zero, zero, zero)
        if HAS.standardize:
            spread_s = spread(moments(s - s_top[:, None], cols, C, 0), C)
            spread_t = spread(moments(t - t_top[:, None], cols, C, 0), C)
        sums_s = _tile_sums(x, s, s_top, spread_s, non_target, HAS)
        sums_t = _tile_sums(x, t, t_top, spread_t, non_target, HAS)
        of_s, of_t, saved = _softmaxes(sums_s, sums_t, spread_s, spread_t, logz_p)
    terms = class_terms(x, s, t, of_s, of_t, saved, rows, cols, C, non_target, HAS, ALIGN)
    result, of_t, saved = row_terms(x, terms, of_s, of_t, saved, HAS)
    if HAS.soft and HAS.standardize and STATS:
        saved = _with_mean(saved, spread_s.mean * spread_s.inverse, zero)
        target = _target(x, rows, y, of_s, of_t, saved, HAS)
        inner = along(
            soft_gradient(x, y, s, t, of_s, of_t, saved, cols, target, HAS), s - of_s.top[:, None], of_s, saved
        )
        saved = _with_mean(saved, saved.mean, lost(inner, spread_s, C))
    return result, of_s, of_t, saved


@triton.jit
def _with_mean(saved, mean, lost_share):
    return Saved(saved.ratio, saved.non_target_ratio, saved.slope, mean, lost_share)


@triton.jit
def _target(x, rows, y, of_s, of_t, saved, HAS: tl.constexpr):
    """What soft_gradient needs of the labels."""
    if HAS.decoupled:
        return target_gradient(x, rows, y, of_s, of_t, saved, HAS)
    else:
        zero = tl.zeros(rows.shape, tl.float32)
        return Share(zero, zero, zero)


@triton.jit
def _tile_sums(x, z, top, spread, non_target, HAS: tl.constexpr):
    """Of rows that lie in one tile."""
    non_target_top = tl.full(top.shape, NEG_INF, tl.float32)
    non_target_total = tl.zeros(top.shape, tl.float32)
    total = tl.sum(tl.exp(scaled(z - top[:, None], spread.inverse, x, HAS)), 1)
    if HAS.decoupled:
        others = tl.where(non_target, z, NEG_INF)
        non_target_top = tl.max(others, 1)
        from_top = others - tl.where(non_target_top == NEG_INF, 0.0, non_target_top)[:, None]
        non_target_total = tl.sum(tl.exp(scaled(from_top, spread.inverse, x, HAS)), 1)
    return Sums(top, total, non_target_top, non_target_total)


@triton.jit
def _softmaxes(s, t, spread_s, spread_t, logz_p):
    """Both networks' statistics, and the ratios but for their last digits."""
    zero = logz_p * 0.0
    ratio = tl.log(t.total / s.total)  # not the difference of two logarithms: it keeps its digits near 0
    of_s = _softmax(s, spread_s, logz_p, log_sum(s.total))
    of_t = _softmax(t, spread_t, zero, of_s.logz + ratio)
    return of_s, of_t, Saved(ratio, ratio_of(s.non_target_total, t.non_target_total), zero, zero, zero)


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
    of_s, of_t, saved = _chunked_softmax(x, y, spread_s, spread_t, rows, C, HAS, ALIGN, BLOCK_C)
    result, of_t, saved = chunked_terms(x, y, of_s, of_t, saved, rows, C, HAS, ALIGN, BLOCK_C)
    if HAS.soft and HAS.standardize and STATS:
        saved = _with_mean(saved, spread_s.mean * spread_s.inverse, zero)
        target = _target(x, rows, y, of_s, of_t, saved, HAS)
        inner = zero
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            s = load_tile(x.student, rows, cols, C, NEG_INF, ALIGN)
            t = load_tile(x.teacher, rows, cols, C, NEG_INF, ALIGN)
            inner += along(
                soft_gradient(x, y, s, t, of_s, of_t, saved, cols, target, HAS), s - of_s.top[:, None], of_s, saved
            )
        saved = _with_mean(saved, saved.mean, lost(inner, spread_s, C))
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
    none = Saved(zero, zero, zero, zero, zero)
    return Softmax(of_rows.top, zero, logz_p, zero, zero, zero), Softmax(zero, zero, zero, zero, zero, zero), none


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
    """The columns' sums joined."""
    top, total = joined(sums.top, sums.total, inverse_t)
    non_target_top, non_target_total = top, total
    if HAS.decoupled:
        non_target_top, non_target_total = joined(sums.non_target_top, sums.non_target_total, inverse_t)
    return Sums(top, total, non_target_top, non_target_total)
