"""The forward kernels of softmax_kl: one over the rows, and one that sums what its programs left.

Notation as in reference.py: z logits, T temperature, p = softmax(z), q = softmax(z / T), s student, t teacher, {a, b} a
row's labels, S the probability of the other classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import aligned
from .triton_device import (
    NEG_INF,
    dense_ce,
    kl,
    load_at,
    load_labels,
    load_tile,
    log_rest,
    log_sum,
    online,
    others,
    rest_log_q,
    target_kl,
    weighted,
)


@triton.jit
def rows_kernel(
    student,  # [N, C]
    teacher,  # [N, C]
    target,  # [N] labels, or [N, C] where DENSE
    target_mixed,  # [N]
    lam,  # [] or [N]
    loss,  # [N] where PER_ROW, [] where ONE_PROGRAM, else [2, programs]: the sums of rows, and how many rows count
    stats,  # [5, N], or [9, N] where decoupled: maxima s, t; log-sums p_s, q_s, q_t; the others' maxima and log-sums
    scale,  # []
    N,
    C,
    s_strides,
    t_strides,
    target_strides,
    label_strides,  # of target, target_mixed, lam
    inverse_t,
    w_ce,
    w_kl,
    w_target,
    w_other,
    ignore_index,
    CE: tl.constexpr,
    KL: tl.constexpr,
    TARGET: tl.constexpr,
    OTHER: tl.constexpr,
    LABELS: tl.constexpr,
    MIXED: tl.constexpr,
    DENSE: tl.constexpr,
    MEAN: tl.constexpr,
    PER_ROW: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    STATS: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one chunk
    ALIGN: tl.constexpr,  # divides C and what lies between rows
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DECOUPLED: tl.constexpr = TARGET or OTHER
    TEACHER: tl.constexpr = KL or DECOUPLED
    C = aligned(C, ALIGN)
    pid = tl.program_id(0)
    row_index = pid * ROWS + tl.arange(0, ROWS)
    inside = row_index < N
    rows = tl.minimum(row_index, N - 1).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    if LABELS:
        a, b, weight_a, weight_b, keep, valid = load_labels(
            target, target_mixed, lam, rows, label_strides, C, ignore_index, MIXED
        )

    # maxima and sums of exponentials
    s_max = tl.full([ROWS], NEG_INF, tl.float32)
    t_max = tl.full([ROWS], NEG_INF, tl.float32)
    rest_max_s = tl.full([ROWS], NEG_INF, tl.float32)
    rest_max_t = tl.full([ROWS], NEG_INF, tl.float32)
    sum_p = tl.zeros([ROWS], tl.float32)
    sum_s = tl.zeros([ROWS], tl.float32)
    sum_t = tl.zeros([ROWS], tl.float32)
    rest_sum_s = tl.zeros([ROWS], tl.float32)
    rest_sum_t = tl.zeros([ROWS], tl.float32)
    if WHOLE:
        s = load_tile(student, rows, cols, s_strides, C, NEG_INF, ALIGN)
        s_max = tl.max(s, 1)
        s = s - s_max[:, None]
        if CE:
            sum_p = tl.sum(tl.exp(s), 1)
        if TEACHER:
            t = load_tile(teacher, rows, cols, t_strides, C, NEG_INF, ALIGN)
            t_max = tl.max(t, 1)
            t = (t - t_max[:, None]) * inverse_t
            sum_s = tl.sum(tl.exp(s * inverse_t), 1)
            sum_t = tl.sum(tl.exp(t), 1)
            if DECOUPLED:
                other = others(cols, a, b)
                rest_max_s, rest_sum_s = online(rest_max_s, rest_sum_s, tl.where(other, s * inverse_t, NEG_INF), 1.0)
                rest_max_t, rest_sum_t = online(rest_max_t, rest_sum_t, tl.where(other, t, NEG_INF), 1.0)
    else:
        for start in range(0, C, BLOCK_C):
            s = load_tile(student, rows, start + cols, s_strides, C, NEG_INF, ALIGN)
            if CE:
                _, sum_p = online(s_max, sum_p, s, 1.0)
            if TEACHER:
                t = load_tile(teacher, rows, start + cols, t_strides, C, NEG_INF, ALIGN)
                t_max, sum_t = online(t_max, sum_t, t, inverse_t)
                if DECOUPLED:
                    other = others(start + cols, a, b)
                    rest_max_s, rest_sum_s = online(rest_max_s, rest_sum_s, tl.where(other, s, NEG_INF), inverse_t)
                    rest_max_t, rest_sum_t = online(rest_max_t, rest_sum_t, tl.where(other, t, NEG_INF), inverse_t)
            s_max, sum_s = online(s_max, sum_s, s, inverse_t)
        if DECOUPLED:  # raw so far; what is kept is relative to the row's maximum, over T
            rest_max_s = (rest_max_s - s_max) * inverse_t
            rest_max_t = (rest_max_t - t_max) * inverse_t
    logz_p = log_sum(sum_p)
    logz_s = log_sum(sum_s)
    logz_t = log_sum(sum_t)
    rest_logz_s = log_sum(rest_sum_s)
    rest_logz_t = log_sum(rest_sum_t)
    rest_max_s = tl.where(rest_sum_s == 0, 0.0, rest_max_s)  # no other class: S = exp(-inf)
    rest_max_t = tl.where(rest_sum_t == 0, 0.0, rest_max_t)
    if not CE:
        logz_p = tl.zeros([ROWS], tl.float32)
    if not TEACHER:
        t_max = tl.zeros([ROWS], tl.float32)
        logz_s = tl.zeros([ROWS], tl.float32)
        logz_t = tl.zeros([ROWS], tl.float32)

    # the terms that sum over the classes
    result = tl.zeros([ROWS], tl.float32)
    if WHOLE:
        if CE and DENSE:
            y = load_tile(target, rows, cols, target_strides, C, 0.0, ALIGN)
            result += w_ce * dense_ce(y, s - logz_p[:, None])
        if KL:
            result += w_kl * kl(s * inverse_t - logz_s[:, None], t - logz_t[:, None])
        if OTHER:
            result += w_other * kl(
                rest_log_q(s * inverse_t, rest_max_s, rest_logz_s, other), rest_log_q(t, rest_max_t, rest_logz_t, other)
            )
    elif KL or OTHER or (CE and DENSE):
        for start in range(0, C, BLOCK_C):
            s = load_tile(student, rows, start + cols, s_strides, C, NEG_INF, ALIGN) - s_max[:, None]
            if CE and DENSE:
                y = load_tile(target, rows, start + cols, target_strides, C, 0.0, ALIGN)
                result += w_ce * dense_ce(y, s - logz_p[:, None])
            if TEACHER:
                s = s * inverse_t
                t = (load_tile(teacher, rows, start + cols, t_strides, C, NEG_INF, ALIGN) - t_max[:, None]) * inverse_t
                if KL:
                    result += w_kl * kl(s - logz_s[:, None], t - logz_t[:, None])
                if OTHER:
                    other = others(start + cols, a, b)
                    result += w_other * kl(
                        rest_log_q(s, rest_max_s, rest_logz_s, other), rest_log_q(t, rest_max_t, rest_logz_t, other)
                    )

    # the terms of the labels alone
    if LABELS and (CE or TARGET):
        s_a = load_at(student, rows, a, s_strides) - s_max
        s_b = load_at(student, rows, b, s_strides) - s_max
        if CE:
            ce = weighted(weight_a, s_a - logz_p)
            if MIXED:
                ce += weighted(weight_b, s_b - logz_p)
            result -= w_ce * ce
        if TARGET:
            log_qs_a = s_a * inverse_t - logz_s
            log_qs_b = s_b * inverse_t - logz_s
            log_qt_a = (load_at(teacher, rows, a, t_strides) - t_max) * inverse_t - logz_t
            log_qt_b = (load_at(teacher, rows, b, t_strides) - t_max) * inverse_t - logz_t
            mass_s = tl.exp(log_qs_a) + tl.where(a == b, 0.0, tl.exp(log_qs_b))
            mass_t = tl.exp(log_qt_a) + tl.where(a == b, 0.0, tl.exp(log_qt_b))
            log_ss = log_rest(mass_s, rest_max_s, rest_logz_s, logz_s)
            log_st = log_rest(mass_t, rest_max_t, rest_logz_t, logz_t)
            result += w_target * target_kl(log_qs_a, log_qs_b, log_qt_a, log_qt_b, a == b, log_ss, log_st)
    if DECOUPLED:
        result += (logz_s + logz_t) * 0.0  # NaN or inf among the labelled logits must not hide behind the others
    if LABELS:
        result = tl.where(keep, tl.where(valid, result, float("nan")), 0.0)

    if PER_ROW:
        tl.store(loss + row_index, result, mask=inside)
        if pid == 0:
            tl.store(scale, 1.0)
    else:
        total = tl.sum(tl.where(inside, result, 0.0), 0)
        count = tl.sum(inside.to(tl.float32), 0)
        if LABELS:
            count = tl.sum((inside & keep).to(tl.float32), 0)
        if ONE_PROGRAM:
            factor = 1.0
            if MEAN:
                factor = 1.0 / tl.maximum(count, 1.0)
            tl.store(scale, factor)
            tl.store(loss, total * factor)
        else:
            tl.store(loss + pid, total)
            tl.store(loss + tl.num_programs(0) + pid, count)
    if STATS:
        step = rows * 0 + N  # 64-bit
        tl.store(stats + rows, s_max, mask=inside)
        tl.store(stats + step + rows, t_max, mask=inside)
        tl.store(stats + 2 * step + rows, logz_p, mask=inside)
        tl.store(stats + 3 * step + rows, logz_s, mask=inside)
        tl.store(stats + 4 * step + rows, logz_t, mask=inside)
        if DECOUPLED:
            tl.store(stats + 5 * step + rows, rest_max_s, mask=inside)
            tl.store(stats + 6 * step + rows, rest_max_t, mask=inside)
            tl.store(stats + 7 * step + rows, rest_logz_s, mask=inside)
            tl.store(stats + 8 * step + rows, rest_logz_t, mask=inside)


@triton.jit
def sum_kernel(
    partial,  # [2, P]: sums of rows, and how many rows count
    loss,  # []
    scale,  # []
    P,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    totals = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        at = start + tl.arange(0, BLOCK)
        totals += tl.load(partial + at, mask=at < P, other=0.0)
        counts += tl.load(partial + P + at, mask=at < P, other=0.0)
    factor = 1.0
    if MEAN:
        factor = 1.0 / tl.maximum(tl.sum(counts, 0), 1.0)
    tl.store(scale, factor)
    tl.store(loss, tl.sum(totals, 0) * factor)
